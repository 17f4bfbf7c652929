"""Attention over kept rows against softmax attention in float64, head by head."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from ds_offload.kernels.sparse_attention import sparse_attention, sparse_attention_reference

# For results of order 1.
TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.float16: {"rtol": 2e-3, "atol": 2e-3},
    torch.bfloat16: {"rtol": 1.6e-2, "atol": 1e-2},
}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
ATTENDS = [sparse_attention, sparse_attention_reference]
SCALING = 0.2


def case(heads: int, kv_heads: int, dim: int, count: int, dtype: torch.dtype, device: str):
    """Rows of two sequences, about a third of them masked."""
    query = torch.randn(2, heads, dim).to(dtype)
    rows = torch.randn(2, kv_heads, count, 2, dim).to(dtype)
    valid = torch.rand(2, kv_heads, count) > 0.3
    valid[..., count // 2] = True
    return query.to(device), rows.to(device), valid.to(device)


def naive(query: torch.Tensor, rows: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    dtype, group = query.dtype, query.shape[1] // rows.shape[1]
    query, rows, valid = query.cpu(), rows.cpu(), valid.cpu()
    out = torch.empty(query.shape, dtype=torch.float64)
    for b in range(query.shape[0]):
        for head in range(query.shape[1]):
            keys, values = rows[b, head // group, valid[b, head // group]].double().unbind(1)
            out[b, head] = (SCALING * (keys @ query[b, head].double())).softmax(0) @ values
    return out.to(dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("attend", ATTENDS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (8, 1)])
@pytest.mark.parametrize("dim", [16, 17, 64, 65, 80, 128])
def test_attention(attend: Callable, dtype: torch.dtype, heads: int, kv_heads: int, dim: int, device: str) -> None:
    for count in (1, 7, 257):
        args = case(heads, kv_heads, dim, count, dtype, device)
        out = attend(*args, SCALING)
        assert out.dtype == dtype
        torch.testing.assert_close(out.cpu(), naive(*args), **TOLERANCE[dtype])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("attend", ATTENDS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_all_rows_but_one_masked(attend: Callable, dtype: torch.dtype, device: str) -> None:
    query, rows, valid = case(6, 2, 64, 100, dtype, device)
    valid[:] = False
    valid[:, 0, 0] = True
    valid[:, 1, 99] = True
    out = attend(query, rows, valid, SCALING).unflatten(1, (2, 3))
    for head, kept in ((0, 0), (1, 99)):
        expected = rows[:, head, kept, 1, :].unsqueeze(1).expand(2, 3, 64)
        torch.testing.assert_close(out[:, head], expected, **TOLERANCE[dtype])


@pytest.mark.parametrize("attend", ATTENDS)
@pytest.mark.parametrize("rows_dtype", [torch.float16, torch.bfloat16])
def test_rows_of_another_dtype(attend: Callable, rows_dtype: torch.dtype) -> None:
    query, rows, valid = case(4, 2, 32, 50, torch.float32, "cpu")
    rows = rows.to(rows_dtype)
    out = attend(query, rows, valid, SCALING)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, naive(query, rows, valid), **TOLERANCE[torch.float32])


@pytest.mark.parametrize("attend", ATTENDS)
def test_strided_rows(attend: Callable) -> None:
    query, rows, valid = case(4, 2, 32, 50, torch.float32, "cpu")
    wide = torch.full((2, 3, 90, 2, 32), torch.nan)
    wide[:, 1:, 20:70] = rows
    torch.testing.assert_close(
        attend(query, wide[:, 1:, 20:70], valid, SCALING), naive(query, rows, valid), **TOLERANCE[torch.float32]
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2)])
def test_same_bits_in_every_batch(dtype: torch.dtype, heads: int, kv_heads: int) -> None:
    query, rows, valid = case(heads, kv_heads, 64, 600, dtype, "cpu")
    together = sparse_attention(query, rows, valid, SCALING)
    for b in range(2):
        one = slice(b, b + 1)
        assert torch.equal(sparse_attention(query[one], rows[one], valid[one], SCALING)[0], together[b])
