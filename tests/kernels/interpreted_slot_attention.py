"""The Triton kernels of slot attention on CPU tensors; run by test_slot_attention.py under TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch

from ds_offload.kernels import slot_attention, slot_attention_launch
from ds_offload.kernels.segment_table import SegmentTable
from ds_offload.kernels.slot_attention import _launch, slot_attention_reference
from ds_offload.kernels.slot_attention_launch import SlotAttentionLaunch, StoredRows

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
TOLERANCE = {F32: {"rtol": 1e-5, "atol": 1e-5}, F16: {"rtol": 2e-3, "atol": 2e-3}, BF16: {"rtol": 1.6e-2, "atol": 1e-2}}


def run(query: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    out = torch.full_like(query, torch.nan)
    _launch(query, rows, slots, 0.2, out)
    return out


def case(kv_heads: int, group: int, dim: int, count: int, query_dtype: torch.dtype, rows_dtype: torch.dtype):
    """Rows of two sequences, NaN where no slot names them, in any order, a third of the list -1."""
    generator = torch.Generator().manual_seed(dim + count)
    capacity = count + 3
    query = torch.randn(2, kv_heads * group, dim, generator=generator).to(query_dtype)
    rows = torch.randn(2, kv_heads, capacity, 2, dim, generator=generator).to(rows_dtype)
    slots = torch.rand(2, kv_heads, capacity, generator=generator).argsort(-1)[..., :count]
    skipped = torch.rand(slots.shape, generator=generator) < 0.3
    skipped[..., count // 2] = False
    slots = slots.masked_fill(skipped, -1)
    named = torch.zeros(2, kv_heads, capacity + 1, dtype=torch.bool).scatter_(-1, slots % (capacity + 1), True)
    return query, rows.masked_fill(~named[..., :capacity, None, None], torch.nan), slots


@pytest.mark.parametrize(
    ("group", "dim", "query_dtype", "rows_dtype"),
    [
        (1, 16, F32, F32),
        (1, 80, F16, F16),
        (1, 33, F32, BF16),
        (3, 20, F32, F16),
        (3, 80, F16, F16),
        (17, 16, F16, F16),
    ],
)
def test_kernels_equal_the_reference(
    group: int, dim: int, query_dtype: torch.dtype, rows_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for count in (1, 7, 130):
        query, rows, slots = case(2, group, dim, count, query_dtype, rows_dtype)
        expected = slot_attention_reference(query, rows, slots, 0.2)
        torch.testing.assert_close(run(query, rows, slots), expected, **TOLERANCE[query_dtype])


@pytest.mark.parametrize("tensor_cores", [False, True])
def test_splits_without_a_slot_and_more_splits_than_are_combined_at_a_time(
    tensor_cores: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = SlotAttentionLaunch(tensor_cores, 16 if tensor_cores else 1, split=16, tile=16, warps=4, stages=1)
    for module in (slot_attention, slot_attention_launch):
        monkeypatch.setattr(module, "slot_attention_launch", lambda *args: launch)
    monkeypatch.setattr(slot_attention_launch, "COMBINE_SPLITS", 2)
    query, rows, slots = case(1, 2, 16, 100, F32, F32)
    slots[0, 0, :48] = -1
    slots[1, 0, 20:] = -1
    expected = slot_attention_reference(query, rows, slots, 0.2)
    torch.testing.assert_close(run(query, rows, slots), expected, **TOLERANCE[F32])


@pytest.mark.parametrize("dtype", [F32, F16])
def test_same_bits_wherever_rows_stand_in_every_batch_and_however_padded(dtype: torch.dtype) -> None:
    query, rows, slots = case(2, 2, 20, 140, dtype, dtype)
    out = run(query, rows, slots)
    padded = torch.cat((slots, torch.full((2, 2, 200), -1)), -1)
    assert torch.equal(run(query, rows, padded), out)
    order = torch.randperm(rows.shape[2], generator=torch.Generator().manual_seed(0))
    moved = torch.where(slots >= 0, order.argsort()[slots], -1)
    assert torch.equal(run(query, rows[:, :, order], moved), out)
    for b in (0, 1):
        assert torch.equal(run(query[b : b + 1], rows[b : b + 1], slots[b : b + 1])[0], out[b])


def test_strided_rows_and_slots_beyond_them() -> None:
    query, rows, slots = case(2, 2, 20, 9, F16, F16)
    expected = slot_attention_reference(query, rows, slots, 0.2)
    wide = torch.full((2, 3, 40, 2, 20), torch.nan, dtype=F16)
    view = wide[:, 1:, 5:29:2]
    view[:] = rows
    beyond = torch.where(slots >= 0, slots, torch.tensor([12, 2**40, -5]).repeat(3))
    torch.testing.assert_close(run(query, view, beyond), expected, **TOLERANCE[F16])


@pytest.mark.parametrize(("group", "dtype"), [(1, F32), (2, F16)])
def test_rows_of_a_store_give_the_bits_of_the_same_rows_in_a_tensor(group: int, dtype: torch.dtype) -> None:
    query, rows, slots = case(2, group, 20, 40, dtype, dtype)
    stored = store(rows, size=16)
    assert torch.equal(run(query, stored, slots), run(query, rows, slots))
    # Token 60 has no segment.
    slots[..., 3] = 60
    expected = run(query, rows, torch.where(slots == 60, -1, slots))
    assert torch.equal(run(query, stored, slots), expected)


def store(rows: torch.Tensor, size: int) -> StoredRows:
    """Rows [B, Hkv, C, 2, D] as layer 1 of 2 of a store of segments of `size` tokens."""
    padded = torch.nn.functional.pad(rows, (0, 0, 0, 0, 0, -rows.shape[2] % size))
    segments = [[part.expand(2, *part.shape).clone() for part in one.split(size, 1)] for one in padded]
    for one in segments:
        for segment in one:
            segment[0] = torch.nan
    addresses = torch.zeros(len(rows), len(segments[0]) + 1, dtype=torch.int64)
    for b, one in enumerate(segments):
        addresses[b, :-1] = torch.tensor([segment.data_ptr() for segment in one])
    table = SegmentTable(segments, addresses, size)
    return StoredRows(table, 1, rows.shape[1], rows.shape[4], rows.dtype)
