"""The Triton kernels between a prompt's matrix products on CPU tensors; run under TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch
from prompt_rows_case import make_case

from ds_offload.kernels import prompt_rows, rms_norm, swiglu


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(
    ("tokens", "kv_heads", "group", "dim"), [(1, 1, 1, 2), (19, 3, 2, 64), (5, 2, 5, 12), (16, 1, 3, 16)]
)
def test_rows(tokens: int, kv_heads: int, group: int, dim: int, normed: bool) -> None:
    ours, theirs = (make_case(tokens, kv_heads, group, dim, normed) for _ in range(2))
    prompt_rows._launch(*ours.arguments)
    prompt_rows.prompt_rows_reference(*theirs.arguments)
    torch.testing.assert_close(ours.queries, theirs.queries, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.staging, theirs.staging, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_of_halves(dtype: torch.dtype) -> None:
    ours, theirs = (make_case(7, 2, 2, 16, True, dtype) for _ in range(2))
    prompt_rows._launch(*ours.arguments)
    prompt_rows.prompt_rows_reference(*theirs.arguments)
    torch.testing.assert_close(ours.queries, theirs.queries, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(ours.staging, theirs.staging, rtol=1e-2, atol=1e-3, equal_nan=True)


@pytest.mark.parametrize(("rows", "channels"), [(0, 4), (1, 1), (3, 100), (2, 4096)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms(rows: int, channels: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(channels)
    x, weight = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((rows, channels), (channels,)))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(
        rms_norm._launch(x, weight, 1e-5), rms_norm.rms_norm_reference(x, weight, 1e-5), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (3, 100), (2, 4096)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu(shape: tuple[int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(shape[1])
    gate, up = (torch.randn(*shape, generator=generator).to(dtype) * 3 for _ in range(2))
    expected = swiglu.swiglu_reference(gate, up)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(swiglu._launch(gate, up), expected, rtol=tolerance, atol=tolerance)
