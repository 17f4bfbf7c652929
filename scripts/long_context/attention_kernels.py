"""Which of torch's attention kernels is the fastest there and back, at the length that matters."""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from long_context.adapted_llama import Attention, dense_attention

TOKENS = 16_384
# Largest relative difference of two kernels' outputs and gradients in bfloat16.
TOLERANCE = 0.02


def attention_of(backend: SDPBackend) -> Attention:
    """Causal attention by one kernel, which fails where that does not take the inputs."""

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(query, key, value, is_causal=True)

    return attention


def fastest_attention(heads: int, head_dim: int, device: torch.device) -> Attention:
    """FlashAttention's kernel, or cuDNN's where it agrees with it and is faster; torch's choice on a CPU."""
    if device.type != "cuda":
        return dense_attention
    chance = torch.Generator(device).manual_seed(0)
    shape = (1, TOKENS, heads, head_dim)
    # The layout that projections leave: the heads of a token side by side.
    drawn = [torch.randn(shape, device=device, dtype=torch.bfloat16, generator=chance) for _ in range(4)]
    inputs = [part.transpose(1, 2).requires_grad_() for part in drawn[:3]]
    flash, cudnn = attention_of(SDPBackend.FLASH_ATTENTION), attention_of(SDPBackend.CUDNN_ATTENTION)
    expected, flash_ms = _there_and_back(flash, inputs, drawn[3].transpose(1, 2))
    try:
        found, cudnn_ms = _there_and_back(cudnn, inputs, drawn[3].transpose(1, 2))
    except RuntimeError as error:
        print(f"attention: flash, {flash_ms:.1f} ms; cuDNN does not run ({str(error).splitlines()[0]})", flush=True)
        return flash
    worst = max(float((a - b).float().norm() / b.float().norm()) for a, b in zip(found, expected, strict=True))
    chosen = "cuDNN" if worst < TOLERANCE and cudnn_ms < flash_ms else "flash"
    print(f"attention: {chosen}; flash {flash_ms:.1f} ms, cuDNN {cudnn_ms:.1f} ms, apart by {worst:.4f}", flush=True)
    return cudnn if chosen == "cuDNN" else flash


def _there_and_back(attention: Attention, inputs: list[Tensor], gradient: Tensor) -> tuple[list[Tensor], float]:
    """Output and gradients, and the milliseconds of a second run."""
    for _ in range(2):
        torch.cuda.synchronize()
        started = time.monotonic()
        output = attention(*inputs)
        results = [output.detach(), *torch.autograd.grad(output, inputs, gradient)]
        torch.cuda.synchronize()
    return results, 1000 * (time.monotonic() - started)
