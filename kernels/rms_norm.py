"""RMSNorm of many rows in one launch: each is read once and written once."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_offload.kernels.triton_runtime import jit, launching, power_of_two, tl


@jit
def _rms_norm_kernel(x, weight, out, eps, K: tl.constexpr, K_PAD: tl.constexpr):
    """One program norms one row."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, K_PAD)
    live = channel < K
    value = tl.load(x + row * K + channel, mask=live, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(value * value, 0) / K + eps)
    gain = tl.load(weight + channel, mask=live, other=0.0).to(tl.float32)
    tl.store(out + row * K + channel, (value * scale * gain).to(out.dtype.element_ty), mask=live)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x over the root mean square of its row, times `weight`: computed in float32 and rounded once.

    Args:
        x: [N, K], contiguous; float32, float16 or bfloat16.
        weight: [K] of x's dtype.
        eps: Added to the mean square.

    Returns:
        [N, K] of x's dtype.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    if x.dim() != 2 or not x.is_contiguous():
        raise ValueError(f"x {tuple(x.shape)} must be [N, K], contiguous")
    if weight.shape != x.shape[1:] or weight.dtype != x.dtype or weight.device != x.device:
        raise ValueError(f"weight {weight.dtype} {tuple(weight.shape)} must be {x.dtype} ({x.shape[1]},) on {x.device}")
    if not x.is_cuda:
        return rms_norm_reference(x, weight, eps)
    with launching(x.device, "rms_norm"):
        return _launch(x, weight, eps)


def _launch(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out = torch.empty_like(x)
    rows, channels = x.shape
    if out.numel():
        padded = power_of_two(channels)
        _rms_norm_kernel[(rows,)](
            x, weight.contiguous(), out, eps, K=channels, K_PAD=padded, num_warps=8 if padded >= 4096 else 4
        )
    return out


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm` in torch."""
    value = x.float()
    return (value * torch.rsqrt(value.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)
