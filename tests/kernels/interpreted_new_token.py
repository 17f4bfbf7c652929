"""The Triton kernels of the new token on CPU tensors; run by test_new_token.py under TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch
from new_token_case import assert_close_labels, make_case

from ds_offload.kernels.new_token import _launch, _rotate, new_token_reference, rotate_heads_reference


@pytest.mark.parametrize("bits", [16, 8, 4, 2, None])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize(("kv_heads", "group", "dim"), [(1, 1, 2), (3, 2, 64), (2, 5, 12)])
def test_kernel_equals_the_reference(
    kv_heads: int, group: int, dim: int, windowed: bool, normed: bool, bits: int | None
) -> None:
    ours, theirs = (make_case(kv_heads, group, dim, bits, normed, windowed) for _ in range(2))
    query = _launch(*ours.arguments, ours.norms, ours.window, ours.labels)
    expected = new_token_reference(*theirs.arguments, norms=theirs.norms, window=theirs.window, labels=theirs.labels)
    torch.testing.assert_close(query, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.kv_rows, theirs.kv_rows, rtol=1e-5, atol=1e-6)
    if windowed:
        torch.testing.assert_close(ours.window.rows, theirs.window.rows, rtol=1e-5, atol=1e-6, equal_nan=True)
    if bits is not None:
        assert_close_labels(ours.labels, theirs.labels)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves(dtype: torch.dtype) -> None:
    ours, theirs = (make_case(2, 2, 16, 2, True, True, dtype) for _ in range(2))
    query = _launch(*ours.arguments, ours.norms, ours.window, ours.labels)
    expected = new_token_reference(*theirs.arguments, norms=theirs.norms, window=theirs.window, labels=theirs.labels)
    torch.testing.assert_close(query, expected, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(ours.kv_rows, theirs.kv_rows, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("normed", [False, True])
def test_rotated_heads(normed: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    heads = torch.randn(3, 5, 12, generator=generator)
    rope = torch.randn(3, 12, generator=generator), torch.randn(3, 12, generator=generator)
    weight = torch.randn(12, generator=generator) if normed else None
    expected = rotate_heads_reference(heads, rope, weight, 1e-6)
    torch.testing.assert_close(_rotate(heads, rope, weight, 1e-6), expected, rtol=1e-5, atol=1e-6)
