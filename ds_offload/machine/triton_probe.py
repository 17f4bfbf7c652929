"""A small Triton kernel that shows whether Triton compiles and launches."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_offload.kernels.triton_runtime import jit, launching, power_of_two, tl


@jit
def _scale_kernel(source, out, length, LENGTH_PAD: tl.constexpr):
    """out[i] = 2 * source[i] + i, of one program."""
    index = tl.arange(0, LENGTH_PAD)
    value = tl.load(source + index, mask=index < length, other=0.0).to(tl.float32)
    tl.store(out + index, 2.0 * value + index, mask=index < length)


def scale(source: Tensor) -> Tensor:
    """2 * source[i] + i, by the Triton kernel.

    Args:
        source: `[N]` on a CUDA device, at least one element, contiguous.

    Returns:
        `[N]` float32.

    Raises:
        ValueError: `source` is not of that shape.
        RuntimeError: Triton is not installed.
    """
    _check(source)
    with launching(source.device, "the probe kernel"):
        return _launch(source)


def _launch(source: Tensor) -> Tensor:
    out = torch.empty(source.shape, dtype=torch.float32, device=source.device)
    _scale_kernel[(1,)](source, out, len(source), LENGTH_PAD=power_of_two(len(source)))
    return out


def scale_reference(source: Tensor) -> Tensor:
    """`scale` in torch."""
    _check(source)
    return 2.0 * source.float() + torch.arange(len(source), device=source.device)


def _check(source: Tensor) -> None:
    if source.dim() != 1 or len(source) == 0 or not source.is_contiguous():
        raise ValueError(f"source {tuple(source.shape)} must be [N] with N at least 1, contiguous")
