"""Hot set: the rows it gives are the store's, hits move nothing, the least recently selected leave."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ds_offload.kernels.admit_state import AdmitState
from ds_offload.kernels.new_token import new_token
from ds_offload.memory.hot_set import KEPT_WORKSPACE, HotSet, _give_back_workspace
from ds_offload.memory.kv_store import KVStore
from ds_offload.memory.pinned_pool import PinnedPool
from ds_offload.memory.window import AttentionWindow

CPU = torch.device("cpu")
HEADS, DIM, LENGTH = 2, 8, 90


def make(
    capacity: int,
    window: AttentionWindow,
    sequences: int = 2,
    reuse: bool = True,
    admissions: int = 1,
    least: int = 1,
    layers: int = 1,
) -> tuple[HotSet, torch.Tensor]:
    pool = PinnedPool(CPU)
    shape = {"kv_heads": HEADS, "head_dim": DIM, "device": CPU}
    numbers = range(3, 3 + layers)
    store = KVStore(
        layers=numbers,
        sequences=sequences,
        dtype=torch.float32,
        pool=pool,
        segment_tokens=16,
        max_tokens=LENGTH,
        **shape,
    )
    rows = torch.randn(sequences, HEADS, LENGTH, 2, DIM, generator=torch.Generator().manual_seed(0))
    for number in range(sequences):
        store.reserve(number, LENGTH)
        store.write_prompt(3, number, 0, rows[number])
    sizes = {"sequences": sequences, "capacity": capacity, "context": LENGTH, "admissions": admissions}
    hot = HotSet(store, layers=numbers, window=window, reuse=reuse, least=least, **sizes, **shape)
    return hot, rows


def packed(hot: HotSet, places: torch.Tensor) -> torch.Tensor:
    index = places.clamp(min=0)[..., None, None].expand(*places.shape, 2, DIM)
    return hot.rows(3).gather(2, index)


@pytest.mark.parametrize("capacity", [6, 7, 12, 40])
def test_admitted_rows_are_the_stores_rows_over_many_steps(capacity: int) -> None:
    hot, rows = make(capacity, AttentionWindow(2, 3))
    generator = torch.Generator().manual_seed(capacity)
    for _ in range(40):
        hot.begin_step()
        tokens = torch.stack(
            [
                torch.stack([torch.randperm(30, generator=generator)[:6].sort().values + 5 for _ in range(HEADS)])
                for _ in range(2)
            ]
        )
        tokens[1, 0, 4:] = -1
        places = hot.admit(3, tokens)
        valid = tokens >= 0
        expected = rows.gather(2, tokens.clamp(min=0)[..., None, None].expand(-1, -1, -1, 2, DIM))
        assert torch.equal(packed(hot, places)[valid], expected[valid])
        assert len(set(places[1, 1].tolist())) == 6
        assert (places[~valid] == -1).all()


def test_slots_take_no_memory_before_the_first_step_and_the_window_stays() -> None:
    hot, _ = make(7, AttentionWindow(2, 3))
    window = torch.randn(2, HEADS, 6, 2, DIM)
    assert hot.rows(3).shape[2] == 6
    hot.rows(3).copy_(window)
    hot.begin_step()
    assert hot.rows(3).shape[2] == 6 + 7 and torch.equal(hot.rows(3)[:, :, :6], window)
    assert hot.window.tensor(3) is hot.rows(3)


def test_there_are_fewer_slots_where_the_memory_has_gone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Down to what a step selects; a copy for which there is less room than for the original begins empty."""
    room = {"slots": 12}
    empty = AdmitState.empty

    def scarce(batch: int, kv_heads: int, capacity: int, *rest: Any) -> AdmitState:
        if capacity > room["slots"]:
            raise torch.OutOfMemoryError
        return empty(batch, kv_heads, capacity, *rest)

    monkeypatch.setattr("ds_offload.memory.hot_set.AdmitState.empty", scarce)
    hot, rows = make(20, AttentionWindow(2, 3), sequences=1, least=6)
    hot.begin_step()
    assert hot.capacity == 11 and "11 slots a head instead of 15" in capsys.readouterr().err
    tokens = torch.arange(10, 16).expand(1, HEADS, -1)
    assert torch.equal(packed(hot, hot.admit(3, tokens)), rows[:, :, 10:16])
    room["slots"] = 7
    copied, _ = make(20, AttentionWindow(2, 3), sequences=1, least=7)
    copied.copy_from(hot)
    assert copied.capacity == 7
    copied.begin_step()
    assert torch.equal(packed(copied, copied.admit(3, tokens)), rows[:, :, 10:16])
    room["slots"] = 5
    none, _ = make(20, AttentionWindow(2, 3), sequences=1, least=6)
    with pytest.raises(torch.OutOfMemoryError):
        none.begin_step()


@pytest.mark.parametrize(("kept", "given_back"), [(KEPT_WORKSPACE + 1, [True]), (KEPT_WORKSPACE, [])])
def test_a_long_prompts_workspace_goes_back_to_the_system(
    kept: int, given_back: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[bool] = []
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda device: 100 + kept)
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda device: 100)
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: calls.append(True))
    _give_back_workspace(torch.device("cuda"))
    assert calls == given_back
    _give_back_workspace(CPU)
    assert calls == given_back


def test_what_was_made_of_too_large_a_hot_set_makes_room_for_a_smaller_one(monkeypatch: pytest.MonkeyPatch) -> None:
    hot, _ = make(16, AttentionWindow(2, 3), layers=4)
    window = torch.randn(2, HEADS, 6, 2, DIM)
    for layer in range(3, 7):
        hot.rows(layer).copy_(window)
    empty = HotSet._empty

    def scarce(self: HotSet, capacity: int, device: torch.device) -> torch.Tensor:
        if sum(rows.shape[2] - 6 for rows in self._rows.values()) + capacity > 4 * 12:
            raise torch.OutOfMemoryError
        return empty(self, capacity, device)

    monkeypatch.setattr(HotSet, "_empty", scarce)
    hot.begin_step()
    assert hot.capacity == 12
    for layer in range(3, 7):
        assert hot.rows(layer).shape[2] == 6 + 12 and torch.equal(hot.rows(layer)[:, :, :6], window)


def test_a_hit_moves_nothing_and_a_miss_evicts_the_least_recently_selected() -> None:
    hot, _ = make(4, AttentionWindow(0, 0), sequences=1)

    def admit(*tokens: int) -> tuple[int, int]:
        hot.begin_step()
        counts = torch.zeros(1, HEADS, 4, dtype=torch.int64)
        hot.admit(3, torch.tensor(tokens).expand(1, HEADS, -1), counts=counts)
        moved, _, old, _ = counts.sum((0, 1)).tolist()
        return moved, old

    assert admit(1, 2) == (2 * HEADS, 0)
    assert admit(3, 4) == (2 * HEADS, 0)
    assert admit(1, 2) == (0, 2 * HEADS)
    assert admit(5, 6) == (2 * HEADS, 0)  # 3 and 4 leave
    assert admit(1, 2) == (0, 2 * HEADS)
    assert admit(3, 5) == (1 * HEADS, 1 * HEADS)


def test_what_the_last_step_selected_or_brought_is_recent_and_survives_an_admission_that_fills_the_slots() -> None:
    hot, rows = make(4, AttentionWindow(0, 0), sequences=1, admissions=2)
    counts = torch.zeros(1, HEADS, 4, dtype=torch.int64)
    hot.begin_step()
    hot.admit(3, torch.tensor([1, 2]).expand(1, HEADS, -1), counts=counts)
    hot.admit(3, torch.tensor([1, 2, 3, 4]).expand(1, HEADS, -1), counts=counts, attended=False)
    hot.begin_step()
    places = hot.admit(3, torch.tensor([3, 4, 7, 8]).expand(1, HEADS, -1), counts=counts)
    assert counts[0, 0].tolist() == [6, 6, 2, 2]
    assert torch.equal(packed(hot, places), rows[:, :, [3, 4, 7, 8]])
    hot.begin_step()
    hot.begin_step()
    hot.admit(3, torch.tensor([7, 8]).expand(1, HEADS, -1), counts=counts)
    assert counts[0, 0].tolist() == [6, 8, 4, 2]


def test_without_reuse_every_step_fetches_what_it_selects_but_not_what_it_warmed() -> None:
    hot, rows = make(4, AttentionWindow(0, 0), sequences=1, reuse=False, admissions=2)
    counts = torch.zeros(1, HEADS, 4, dtype=torch.int64)
    for _ in range(3):
        hot.begin_step()
        hot.admit(3, torch.tensor([1, 2]).expand(1, HEADS, -1), counts=counts, attended=False)
        places = hot.admit(3, torch.tensor([1, 2, 7, 8]).expand(1, HEADS, -1), counts=counts)
        assert torch.equal(packed(hot, places), rows[:, :, [1, 2, 7, 8]])
    assert counts[0, 0].tolist() == [3 * 4, 3 * 4, 3 * 2, 3 * 2]


@pytest.mark.parametrize("length", [1, 2, 5, 6, 7, 30])
def test_window_rows_after_a_prompt_and_appended_tokens(length: int) -> None:
    window = AttentionWindow(2, 4)
    hot, rows = make(3, window)
    for number in range(2):
        hot.window.fill(3, number, rows[number, :, :length])
    for position in range(length, length + 9):
        at = torch.tensor([position, position])
        take(hot, at, rows[:, :, position])
        lengths = at + 1
        tokens = torch.cat((window.sink_tokens(lengths), window.recent_tokens(lengths)), -1)
        heads = tokens[:, None].expand(-1, HEADS, -1)
        got = packed(hot, hot.window.places(heads))
        expected = rows.gather(2, heads.clamp(min=0)[..., None, None].expand(-1, -1, -1, 2, DIM))
        assert torch.equal(got[heads >= 0], expected[heads >= 0])
        assert position in tokens[0].tolist()


def take(hot: HotSet, positions: torch.Tensor, rows: torch.Tensor) -> None:
    """Take in a token whose rows `[B, Hkv, 2, DIM]` RoPE leaves as they are."""
    projected = torch.cat((rows[:, :, 0], rows[:, :, 0], rows[:, :, 1]), 1).flatten(1)
    rope = torch.ones(2, DIM), torch.zeros(2, DIM)
    new_token(projected, rope, positions, torch.empty_like(rows), window=hot.window.rows(3))


@pytest.mark.parametrize(
    "window", [AttentionWindow(0, 3), AttentionWindow(2, 3), AttentionWindow(7, 0), AttentionWindow(4, 60)]
)
@pytest.mark.parametrize("stops", [[1, 2, 3, 4, 5, 6, 7, 8], [5], [3, 10], [40, 41], [2, 89]])
def test_a_window_filled_in_turns_is_that_of_a_whole_prompt(window: AttentionWindow, stops: list[int]) -> None:
    whole, rows = make(6, window)
    turns, _ = make(6, window)
    for hot in (whole, turns):
        hot.rows(3).zero_()
    whole.window.fill(3, 1, rows[1])
    start = 0
    for stop in [*stops, LENGTH]:
        turns.window.fill(3, 1, rows[1, :, start:stop], start)
        start = stop
    assert torch.equal(turns.rows(3), whole.rows(3))
    assert not whole.rows(3)[0].any() and whole.rows(3)[1].any()


def test_a_copy_has_the_same_slots_and_forgets_them_alone() -> None:
    hot, rows = make(12, AttentionWindow(2, 3), sequences=1)
    copied, _ = make(12, AttentionWindow(2, 3), sequences=1)
    tokens = torch.tensor([[[5, 9, 20], [6, 7, 80]]])
    hot.window.fill(3, 0, rows[0])
    hot.begin_step()
    hot.admit(3, tokens)
    copied.copy_from(hot)
    moved = []
    for held in (hot, copied):
        held.begin_step()
        counts = torch.zeros(1, HEADS, 4, dtype=torch.int64)
        assert torch.equal(packed(held, held.admit(3, tokens, counts=counts))[0, 1], rows[0, 1, tokens[0, 1]])
        moved.append(int(counts[..., 0].sum()))
        window = held.window.places(torch.tensor([[0, 1, 86, 87, 88, 89]])).expand(HEADS, -1)[None]
        assert torch.equal(packed(held, window)[0, 0], rows[0, 0, [0, 1, 86, 87, 88, 89]])
    assert moved == [0, 0]
    copied.forget()
    for held, expected in ((hot, 0), (copied, 6)):
        held.begin_step()
        counts = torch.zeros(1, HEADS, 4, dtype=torch.int64)
        assert torch.equal(packed(held, held.admit(3, tokens, counts=counts))[0, 1], rows[0, 1, tokens[0, 1]])
        assert int(counts[..., 0].sum()) == expected
