"""SwiGLU's product of many rows in one launch, in the place of the gate."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ds_offload.kernels.triton_runtime import jit, launching, tl

_BLOCK = 2048


@jit
def _swiglu_kernel(gate, up, count, BLOCK: tl.constexpr):
    """One program does BLOCK numbers."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < count
    value = tl.load(gate + at, mask=live, other=0.0).to(tl.float32)
    other = tl.load(up + at, mask=live, other=0.0).to(tl.float32)
    value = value / (1.0 + tl.exp(-value)) * other
    tl.store(gate + at, value.to(gate.dtype.element_ty), mask=live)


def swiglu_(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up in the place of `gate`: computed in float32 and rounded once.

    Args:
        gate, up: Of one shape, dtype (float32, float16, bfloat16) and device, contiguous.

    Returns:
        `gate`.

    Raises:
        ValueError: They do not fit.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype or gate.device != up.device:
        raise ValueError(f"gate {gate.dtype} {tuple(gate.shape)} and up {up.dtype} {tuple(up.shape)} must be alike")
    if not (gate.is_contiguous() and up.is_contiguous()):
        raise ValueError("gate and up must be contiguous")
    if not gate.is_cuda:
        return gate.copy_(swiglu_reference(gate, up))
    with launching(gate.device, "swiglu"):
        return _launch(gate, up)


def _launch(gate: Tensor, up: Tensor) -> Tensor:
    if gate.numel():
        _swiglu_kernel[(-(-gate.numel() // _BLOCK),)](gate, up, gate.numel(), BLOCK=_BLOCK, num_warps=4)
    return gate


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up in torch."""
    return (F.silu(gate.float()) * up.float()).to(gate.dtype)
