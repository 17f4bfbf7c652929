"""RMSNorm of many rows: as transformers computes it. Its kernel is interpreted in test_prompt_rows.py."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from ds_offload.kernels.rms_norm import rms_norm, rms_norm_reference

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("rows", "channels"), [(1, 1), (3, 100), (70, 576), (5, 4096), (2, 5120)])
def test_it_is_transformers_norm(rows: int, channels: int, dtype: torch.dtype, device: str) -> None:
    generator = torch.Generator().manual_seed(channels)
    x = torch.randn(rows, channels, generator=generator).to(dtype).to(device)
    norm = LlamaRMSNorm(channels, 1e-5).to(device)
    norm.weight = torch.nn.Parameter(torch.randn(channels, generator=generator).to(dtype).to(device), False)
    out = rms_norm(x, norm.weight, 1e-5)
    tolerance = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(out, norm(x), **tolerance)
    torch.testing.assert_close(out, rms_norm_reference(x, norm.weight, 1e-5), **tolerance)


def test_what_does_not_fit_is_refused() -> None:
    x = torch.zeros(4, 6)
    with pytest.raises(ValueError, match="contiguous"):
        rms_norm(x.t(), torch.zeros(4), 1e-5)
    for weight in (torch.zeros(4), torch.zeros(6, dtype=torch.float16)):
        with pytest.raises(ValueError, match="weight"):
            rms_norm(x, weight, 1e-5)
