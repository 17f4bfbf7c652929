"""Selection: forced tokens, ranges, order, ties, budgets, nesting."""

from __future__ import annotations

import pytest
import torch

from ds_offload.kernels.label_codec import LabelLayout
from ds_offload.memory.label_cache import LabelCache
from ds_offload.memory.label_code import ScalarLabels
from ds_offload.memory.window import AttentionWindow
from ds_offload.prefetch.selection import Selector, Step

HEAD_DIM = 16


def make_labels(lengths: list[int], kv_heads: int, seed: int = 0) -> tuple[LabelCache, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    channels = torch.arange(HEAD_DIM).expand(1, kv_heads, HEAD_DIM)
    mean = torch.zeros(1, kv_heads, HEAD_DIM)
    labels = LabelCache(
        ScalarLabels(LabelLayout(HEAD_DIM, 16), channels, mean, torch.device("cpu")), lengths, torch.device("cpu")
    )
    keys = [torch.randn(kv_heads, length, HEAD_DIM, generator=generator).half().float() for length in lengths]
    for number, key in enumerate(keys):
        labels.write_prompt(0, number, 0, key)
    return labels, keys


def make_step(lengths: list[int], keep: list[int], window: AttentionWindow) -> Step:
    return Step.make(lengths, keep, window, torch.device("cpu"))


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("window", [AttentionWindow(0, 0), AttentionWindow(2, 5)])
def test_equals_a_plain_top_k_per_kv_head(groups: int, window: AttentionWindow) -> None:
    kv_heads, lengths, keep = 2, [97, 40, 3], [20, 7, 0]
    labels, keys = make_labels(lengths, kv_heads)
    query = torch.randn(3, kv_heads * groups, HEAD_DIM, generator=torch.Generator().manual_seed(1))
    tokens = Selector(labels, window, 0.25).select(0, query, make_step(lengths, keep, window)).tokens
    assert tokens.shape == (3, kv_heads, 20)
    for number, length in enumerate(lengths):
        past = keys[number][:, : length - 1]
        scores = torch.einsum("hgd,htd->hgt", query[number].view(kv_heads, groups, -1), past) * 0.25
        weights = (scores.softmax(-1) if groups > 1 else scores).sum(1)
        for head in range(kv_heads):
            low, high = window.sinks, max(window.sinks, length - window.ring)
            order = weights[head, low:high].sort(dim=0, descending=True, stable=True).indices[: keep[number]] + low
            kept = tokens[number, head]
            assert kept[kept >= 0].tolist() == sorted(order.tolist())
            assert (kept[len(order) :] == -1).all()


def test_selected_tokens_lie_between_the_sinks_and_the_recent_window() -> None:
    window = AttentionWindow(4, 8)
    for length in (1, 5, 12, 13, 14, 15, 64):
        labels, _ = make_labels([length], 1)
        keep = window.selected(length, length)
        tokens = (
            Selector(labels, window, 1.0)
            .select(0, torch.randn(1, 2, HEAD_DIM), make_step([length], [keep], window))
            .tokens
        )
        sinks, recent = window.sink_tokens(torch.tensor([length]))[0], window.recent_tokens(torch.tensor([length]))[0]
        every = [n for part in (sinks, tokens[0, 0], recent) for n in part.tolist() if n >= 0]
        # The budget is the whole context: the three parts cover it exactly once.
        assert sorted(every) == list(range(length))


def test_a_larger_budget_keeps_everything_a_smaller_one_kept_whatever_ties_there_are() -> None:
    window, length = AttentionWindow(1, 2), 200
    labels, _ = make_labels([length], 1)
    labels.rows[0, :, 50:150] = labels.rows[0, :, 50:51]
    selector, query = Selector(labels, window, 1.0), torch.randn(1, 1, HEAD_DIM)
    before: set[int] = set()
    for keep in range(1, window.selected(length, length) + 1, 7):
        tokens = selector.select(0, query, make_step([length], [keep], window)).tokens
        kept = {n for n in tokens[0, 0].tolist() if n >= 0}
        assert len(kept) == keep
        assert kept >= before
        before = kept


@pytest.mark.parametrize("groups", [1, 2])
def test_top_p_keeps_the_smallest_set_that_reaches_the_share(groups: int) -> None:
    window, length = AttentionWindow(1, 2), 80
    labels, keys = make_labels([length], 1)
    query = torch.randn(1, groups, HEAD_DIM, generator=torch.Generator().manual_seed(3))
    selection = Selector(labels, window, 0.25, top_p=[0.6]).select(0, query, make_step([length], [70], window))
    kept = selection.tokens[0, 0][selection.tokens[0, 0] >= 0]
    assert selection.keep.tolist() == [[len(kept)]]
    weights = (torch.einsum("gd,td->gt", query[0], keys[0][0][:-1]) * 0.25).softmax(-1).sum(0) / groups
    forced = weights[:1].sum() + weights[-2:].sum()
    assert weights[kept].sum() + forced >= 0.6
    assert weights[kept].sum() + forced - weights[kept].min() < 0.6


def test_top_p_keeps_no_more_than_the_cap_of_each_sequence() -> None:
    labels, _ = make_labels([80, 50], 1)
    query = torch.zeros(2, 2, HEAD_DIM)
    step = make_step([80, 50], [20, 7], AttentionWindow(0, 0))
    selection = Selector(labels, AttentionWindow(0, 0), 0.25, top_p=[0.99]).select(0, query, step)
    assert selection.keep.tolist() == [[20], [7]]
    assert (selection.tokens >= 0).sum(-1).tolist() == [[20], [7]]


def test_top_p_keeps_nothing_beyond_what_reaches_the_share() -> None:
    labels, _ = make_labels([5], 1)
    weights = torch.tensor([[[0.25, 0.5, 0.125, 0.125, 0.0]]])
    selector = Selector(labels, AttentionWindow(1, 0), 1.0)
    for share, needed in ((0.25, 0), (0.26, 1), (0.75, 1), (0.8, 2), (0.875, 2)):
        assert selector._needed(weights, torch.tensor([4]), share).tolist() == [[needed]]


@pytest.mark.parametrize("top_p", [None, [0.6]])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_first_token_selects_nothing(groups: int, top_p: list[float] | None) -> None:
    labels, _ = make_labels([1, 30], 1)
    query = torch.randn(2, groups, HEAD_DIM)
    window = AttentionWindow(0, 0)
    tokens = Selector(labels, window, 1.0, top_p).select(0, query, make_step([1, 30], [5, 5], window)).tokens
    assert (tokens[0] == -1).all() and (tokens[1, :, 0] >= 0).all()


@pytest.mark.parametrize("top_p", [None, [0.6]])
def test_the_look_ahead_takes_the_selection_and_the_next_best(top_p: list[float] | None) -> None:
    window, length = AttentionWindow(1, 2), 200
    labels, _ = make_labels([length, 90], 2)
    query = torch.randn(2, 4, HEAD_DIM, generator=torch.Generator().manual_seed(5))
    selector = Selector(labels, window, 0.25, top_p)
    step = make_step([length, 90], [40, 20], window)
    selection = selector.select(0, query, step)
    ahead = selector.look_ahead(0, selection, step, 50)
    assert ahead.shape == (2, 2, 50)
    for b in range(2):
        for head in range(2):
            kept, more = (set(tokens[b, head].tolist()) - {-1} for tokens in (selection.tokens, ahead))
            assert kept < more and len(more) == len(kept) + len(kept) // 4
            scores = selection.scores[b, head]
            left = [float(scores[n]) for n in range(1, int(step.past[b])) if n not in more]
            assert max(left) <= min(float(scores[n]) for n in more)


def test_a_budget_of_everything_scores_nothing_and_keeps_all_candidates() -> None:
    window = AttentionWindow(2, 5)
    labels, _ = make_labels([97, 40], 2)
    selector = Selector(labels, window, 0.25, everything=True)
    selection = selector.select(0, torch.randn(2, 4, HEAD_DIM), make_step([97, 40], [89, 32], window))
    assert selection.scores is None
    assert selection.tokens[0, 1].tolist() == list(range(2, 91))
    assert selection.tokens[1, 0].tolist() == list(range(2, 34)) + [-1] * 57
