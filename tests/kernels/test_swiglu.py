"""SwiGLU's product: against torch, in the gate's place. Its kernel is interpreted in test_prompt_rows.py."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ds_offload.kernels.swiglu import swiglu_

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 1), (3, 100), (7, 1536), (3, 4099)])
def test_it_is_the_product(shape: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    generator = torch.Generator().manual_seed(shape[1])
    gate, up = ((torch.randn(*shape, generator=generator) * 4).to(dtype).to(device) for _ in range(2))
    gate[0, 0] = -1000
    expected = F.silu(gate) * up
    out = swiglu_(gate, up)
    assert out.data_ptr() == gate.data_ptr()
    torch.testing.assert_close(gate, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_what_does_not_fit_is_refused() -> None:
    gate = torch.zeros(4, 6)
    for up in (torch.zeros(4, 5), torch.zeros(4, 6, dtype=torch.float16)):
        with pytest.raises(ValueError, match="alike"):
            swiglu_(gate, up)
    with pytest.raises(ValueError, match="contiguous"):
        swiglu_(gate.t(), gate.t())
