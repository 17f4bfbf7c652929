"""Triton where it is installed, and a clear error where a kernel needs it and it is not.

Kernels are decorated with `jit` and import everywhere, also on machines for which no
Triton exists; only launching one needs it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

# Products and sums are fused, as Triton does up to 3.9 and will not by default from 3.10 on: speed and bits stay.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

jit: Any
tl: Any
JITFunction: Any
try:
    import triton
    import triton.language

    jit, tl, JITFunction = triton.jit, triton.language, triton.JITFunction
    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False
    tl = JITFunction = None

    def jit(fn: Callable[..., Any] | None = None, **options: Any) -> Any:
        """Leave the kernel as it is: it is never launched."""
        return fn if fn is not None else lambda kernel: kernel


@contextlib.contextmanager
def launching(device: torch.device, kernel: str) -> Iterator[None]:
    """Context for the launch of `kernel` on a CUDA device.

    Raises:
        RuntimeError: Triton is not installed.
    """
    if not HAS_TRITON:
        raise RuntimeError(f"{kernel} on {device} needs Triton, which is not installed; run: pip install 'triton>=3.6'")
    with torch.cuda.device(device):
        yield


def power_of_two(value: int) -> int:
    """The smallest power of two that is at least `value` and 1."""
    return 1 << max(0, value - 1).bit_length()
