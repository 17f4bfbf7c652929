"""Hot set: the rows it gives are the store's, hits move nothing, the least recently selected leave."""

from __future__ import annotations

import pytest
import torch

from ds_offload.memory.hot_set import HotSet
from ds_offload.memory.kv_store import KVStore
from ds_offload.memory.pinned_pool import PinnedPool
from ds_offload.memory.window import AttentionWindow

CPU = torch.device("cpu")
HEADS, DIM, LENGTH = 2, 8, 90


def make(capacity: int, window: AttentionWindow, sequences: int = 2) -> tuple[HotSet, torch.Tensor]:
    pool = PinnedPool(CPU)
    shape = {"kv_heads": HEADS, "head_dim": DIM, "device": CPU}
    store = KVStore(
        layers=[3], sequences=sequences, dtype=torch.float32, pool=pool, segment_tokens=16, max_tokens=LENGTH, **shape
    )
    rows = torch.randn(sequences, HEADS, LENGTH, 2, DIM, generator=torch.Generator().manual_seed(0))
    for number in range(sequences):
        store.reserve(number, LENGTH)
        store.write_prompt(3, number, 0, rows[number])
    hot = HotSet(store, layers=[3], sequences=sequences, window=window, capacity=capacity, **shape)
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
        admission = hot.admit(3, tokens)
        valid = tokens >= 0
        expected = rows.gather(2, tokens.clamp(min=0)[..., None, None].expand(-1, -1, -1, 2, DIM))
        assert torch.equal(packed(hot, admission.places)[valid], expected[valid])
        places = admission.places
        assert len(set(places[1, 1].tolist())) == 6
        assert (places[~valid] == -1).all()


def test_a_hit_moves_nothing_and_a_miss_evicts_the_least_recently_selected() -> None:
    hot, _ = make(4, AttentionWindow(0, 0), sequences=1)

    def admit(*tokens: int) -> tuple[int, int]:
        hot.begin_step()
        admission = hot.admit(3, torch.tensor(tokens).expand(1, HEADS, -1))
        return int(admission.moved.sum()), int(admission.old.sum())

    assert admit(1, 2) == (2 * HEADS, 0)
    assert admit(3, 4) == (2 * HEADS, 0)
    assert admit(1, 2) == (0, 2 * HEADS)
    assert admit(5, 6) == (2 * HEADS, 0)  # 3 and 4 leave
    assert admit(1, 2) == (0, 2 * HEADS)
    assert admit(3, 5) == (1 * HEADS, 1 * HEADS)


def test_rows_warmed_in_the_same_step_do_not_count_as_old_and_survive_the_second_admission() -> None:
    hot, rows = make(4, AttentionWindow(0, 0), sequences=1)
    hot.begin_step()
    hot.admit(3, torch.tensor([1, 2, 3, 4]).expand(1, HEADS, -1))
    admission = hot.admit(3, torch.tensor([3, 4, 7, 8]).expand(1, HEADS, -1))
    assert (int(admission.moved.sum()), int(admission.old.sum())) == (2 * HEADS, 0)
    assert torch.equal(packed(hot, admission.places), rows[:, :, [3, 4, 7, 8]])


@pytest.mark.parametrize("length", [1, 2, 5, 6, 7, 30])
def test_window_rows_after_a_prompt_and_appended_tokens(length: int) -> None:
    window = AttentionWindow(2, 4)
    hot, rows = make(3, window)
    for number in range(2):
        hot.fill_window(3, number, rows[number, :, :length])
    for position in range(length, length + 9):
        at = torch.tensor([position, position])
        hot.append(3, at, rows[:, :, position])
        lengths = at + 1
        tokens = torch.cat((window.sink_tokens(lengths), window.recent_tokens(lengths)), -1)
        heads = tokens[:, None].expand(-1, HEADS, -1)
        got = packed(hot, hot.window_places(heads))
        expected = rows.gather(2, heads.clamp(min=0)[..., None, None].expand(-1, -1, -1, 2, DIM))
        assert torch.equal(got[heads >= 0], expected[heads >= 0])
        assert position in tokens[0].tolist()
