"""Replayed selections repeat themselves as much as measured, and replay the step that the positions name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ds_offload.bench.selections import ReplayedSelections, ReplaySelector
from ds_offload.memory.window import AttentionWindow
from ds_offload.prefetch.selection import Selection, Step

CPU = torch.device("cpu")
WINDOW = AttentionWindow(4, 64)
TOLERANCE = 0.015
STEPS, SETTLED = 200, 130


def members(tokens: Tensor, length: int) -> Tensor:
    """`[S, heads, length]` bool of tokens `[S, 1, heads, K]`."""
    steps, _, heads, _ = tokens.shape
    return torch.zeros(steps, heads, length, dtype=torch.bool).scatter_(2, tokens[:, 0], True)


def hit_rate(selected: Tensor, capacity: int, ahead: Tensor | None = None) -> float:
    """Share of later selections that a set of `capacity` tokens holds, the least recently selected leaving.

    With `ahead` those count as selected behind each step as well.
    """
    steps, heads, length = selected.shape
    last = torch.full((heads, length), -1.0)
    hits = 0
    for step in range(steps):
        if step >= SETTLED:
            # Those of one step leave in random order.
            held = (last + torch.rand(last.shape) / 2).topk(capacity, -1).indices
            assert (last.gather(-1, held) >= 0).all(), "the set is full by now"
            hits += int(selected[step].gather(-1, held).sum())
        last[selected[step]] = step
        if ahead is not None:
            last[ahead[step]] = step
    return hits / int(selected[SETTLED:].sum())


@pytest.mark.parametrize(("length", "heads"), [(8192, 4), (16384, 2)])
def test_they_repeat_themselves_as_the_selections_of_real_text(length: int, heads: int) -> None:
    kept = length // 16
    drawn = ReplayedSelections.draw(STEPS, (1, heads), kept, (0, length), CPU)
    selected = members(drawn.tokens, length)
    overlap = (selected[1:] & selected[:-1]).sum() / selected[1:].sum()
    recall = (selected & members(drawn.predicted, length)).sum() / selected.sum()
    assert float(overlap) == pytest.approx(0.795, abs=TOLERANCE)
    assert float(recall) == pytest.approx(0.83, abs=TOLERANCE)
    for share, expected in ((1.25, 0.86), (2, 0.94), (4, 0.98)):
        assert hit_rate(selected, int(share * kept)) == pytest.approx(expected, abs=TOLERANCE), share
    ahead = members(drawn.ahead, length)
    for share, left in ((2, 0.74), (4, 0.76)):
        misses, missed = 1 - hit_rate(selected, share * kept), 1 - hit_rate(selected, share * kept, ahead)
        assert missed / misses == pytest.approx(left, abs=0.1), share


def test_they_ascend_within_the_candidates_and_differ_between_heads() -> None:
    drawn = ReplayedSelections.draw(5, (2, 3), 40, (7, 507), CPU)
    assert (members(drawn.ahead[:, :1], 507) >= members(drawn.tokens[:, :1], 507)).all()
    for tokens, kept in ((drawn.tokens, 40), (drawn.predicted, 40), (drawn.ahead, 50)):
        assert tokens.shape == (5, 2, 3, kept) and tokens.dtype == torch.int64
        assert (tokens.diff(dim=-1) > 0).all() and int(tokens.min()) >= 7 and int(tokens.max()) < 507
    flat = drawn.tokens.flatten(0, 2)
    assert len(flat.unique(dim=0)) == len(flat)
    again = ReplayedSelections.draw(5, (2, 3), 40, (7, 507), CPU)
    assert torch.equal(drawn.tokens, again.tokens) and torch.equal(drawn.predicted, again.predicted)
    assert drawn.tokens.nbytes + drawn.predicted.nbytes + drawn.ahead.nbytes == ReplayedSelections.nbytes(5, (2, 3), 40)


def test_shuffled_they_are_the_same_sets_in_another_order() -> None:
    drawn = ReplayedSelections.draw(3, (1, 2), 30, (0, 200), CPU)
    shuffled = drawn.shuffled()
    assert not torch.equal(drawn.tokens, shuffled.tokens)
    assert torch.equal(drawn.tokens, shuffled.tokens.sort(-1).values)
    assert torch.equal(drawn.predicted, shuffled.predicted.sort(-1).values)


def test_fewer_candidates_than_are_kept_are_refused() -> None:
    with pytest.raises(ValueError, match="9 candidates"):
        ReplayedSelections.draw(1, (1, 1), 10, (1, 10), CPU)


class Counting:
    """A selector that only counts what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []

    def select(self, layer: int, query: Tensor, step: Step) -> Selection:
        self.asked.append(("select", layer))
        return Selection(torch.empty(0), None, step.keep)

    def predict(self, layer: int, query: Tensor, step: Step) -> Tensor:
        self.asked.append(("predict", layer))
        return torch.empty(0)

    def look_ahead(self, layer: int, selection: Selection, step: Step, width: int) -> Tensor:
        self.asked.append(("look_ahead", layer))
        return torch.empty(0)


def step(length: int, kept: int) -> Step:
    return Step.make([length, length + 5], [kept, kept], WINDOW, CPU)


def test_the_position_says_which_step_is_replayed() -> None:
    drawn = ReplayedSelections.draw(3, (2, 2), 8, (0, 100), CPU)
    inner: Any = Counting()
    selector = ReplaySelector(inner, drawn, first_position=100)
    query = torch.zeros(2, 2, 4)
    for number in range(7):
        now = step(101 + number, 8)
        for layer in range(2):
            selection = selector.select(layer, query, now)
            assert torch.equal(selection.tokens, drawn.tokens[number % 3])
            assert torch.equal(selector.predict(layer, query, now), drawn.predicted[number % 3])
            assert torch.equal(selector.look_ahead(layer, selection, now, 10), drawn.ahead[number % 3])
    each = [(what, layer) for layer in range(2) for what in ("select", "predict", "look_ahead")]
    assert inner.asked == each * 7, "the work of selecting is done every time"
    assert selector.select(0, query, step(101, 5)).tokens.shape == (2, 2, 5)


@pytest.mark.gpu
def test_a_captured_replay_follows_the_position() -> None:
    device = torch.device("cuda")
    drawn = ReplayedSelections.draw(4, (1, 32), 512, (4, 8192), device)
    selector = ReplaySelector(Counting(), drawn, first_position=9000)
    now = Step.make([9001], [512], WINDOW, device)
    query = torch.zeros(1, 32, 4, device=device)
    selector.select(0, query, now)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        selection, predicted = selector.select(0, query, now), selector.predict(1, query, now)
        ahead = selector.look_ahead(0, selection, now, 640)
    for number in range(6):
        now.positions.fill_(9000 + number)
        graph.replay()
        assert torch.equal(selection.tokens, drawn.tokens[number % 4])
        assert torch.equal(ahead, drawn.ahead[number % 4])
        assert torch.equal(predicted, drawn.predicted[number % 4])
