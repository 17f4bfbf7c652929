"""The Triton kernel of the gather on CPU tensors; run by test_gather.py under TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch
from segment_case import store

from ds_offload.kernels import gather
from ds_offload.kernels.gather import GatherLaunch, gather_rows_reference


def words(rows: torch.Tensor) -> torch.Tensor:
    return rows.view(*rows.shape[:3], -1).view(torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kv_heads", "dim"), [(1, 1), (3, 5), (2, 64), (1, 80)])
def test_kernel_equals_the_reference(kv_heads: int, dim: int, dtype: torch.dtype) -> None:
    table = store([3, 1], 5, kv_heads, dim, dtype)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.stack([torch.randperm(15, generator=generator)[:4].sort().values for _ in range(kv_heads)])
    tokens = torch.stack([tokens, torch.tensor([0, -1, 2, 4]).expand(kv_heads, 4)])
    slots = torch.stack([torch.randperm(9, generator=generator)[:4] for _ in range(2 * kv_heads)])
    slots = slots.view(2, kv_heads, 4)
    expected = torch.full((2, kv_heads, 20, 2, dim), torch.nan, dtype=dtype)
    out = expected.clone()
    gather_rows_reference(table, 1, tokens, slots, expected[:, :, 6:15])
    gather._launch(table, 1, tokens, slots, words(out)[:, :, 6:15])
    assert torch.equal(words(out), words(expected))


def test_programs_share_the_rows_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather, "gather_launch", lambda pairs, kept, row_bytes: GatherLaunch(3, 4, 4))
    table = store([4], 25, 2, 8, torch.float32)
    tokens = torch.arange(0, 94, 2).expand(1, 2, 47)
    slots = torch.arange(47).flip(0).expand(1, 2, 47)
    expected = torch.full((1, 2, 47, 2, 8), torch.nan)
    out = expected.clone()
    gather_rows_reference(table, 1, tokens, slots, expected)
    gather._launch(table, 1, tokens, slots, words(out))
    assert torch.equal(out, expected) and not expected.isnan().any()


def test_entries_behind_the_counts_are_not_looked_at() -> None:
    table = store([3, 1], 9, 3, 8, torch.float32)
    tokens = torch.stack([torch.arange(0, 18, 2), torch.arange(9)])[:, None].repeat(1, 3, 1)
    slots = torch.arange(9).flip(0).repeat(2, 3, 1)
    counts = torch.tensor([[0, 4, 9], [1, 8, 2]], dtype=torch.int32)
    expected = torch.full((2, 3, 9, 2, 8), torch.nan)
    out = expected.clone()
    gather_rows_reference(table, 1, tokens, slots, expected, counts)
    behind = torch.arange(9) >= counts[..., None]
    gather._launch(table, 1, tokens.masked_fill(behind, 0), slots.masked_fill(behind, 0), words(out), counts)
    assert torch.equal(words(out), words(expected))


def test_entries_without_a_segment_or_a_slot_are_skipped() -> None:
    table = store([2, 1], 4, 1, 8, torch.float32)
    tokens = torch.tensor([[[0, 8, 12, 10**6, 2**40, 3]], [[4, 0, 1, 2, 3, -5]]])
    slots = torch.tensor([[[0, 1, 2, 3, 4, 5]], [[0, 6, -1, 2**33, 1, 2]]])
    out = torch.full((2, 1, 6, 2, 8), torch.nan)
    expected = out.clone()
    for b, i in ((0, 0), (0, 5), (1, 4)):
        expected[b, 0, slots[b, 0, i]] = table.tensors[b][0][0, 0, tokens[b, 0, i]]
    gather._launch(table, 0, tokens, slots, words(out))
    assert torch.equal(words(out), words(expected))


def test_no_rows() -> None:
    table = store([1], 4, 2, 8, torch.float32)
    none = torch.zeros(1, 2, 0, dtype=torch.int64)
    out = torch.full((1, 2, 3, 2, 8), torch.nan)
    gather._launch(table, 0, none, none, words(out))
    assert out.isnan().all()
