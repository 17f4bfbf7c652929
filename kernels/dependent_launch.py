"""Kernels of a decode step that are made ready while the one before them on its stream still runs.

A step is several hundred short kernels, one behind the other. From compute capability 9.0 on a launch may be
*dependent* (programmatic dependent launch, CUDA C++ Programming Guide): its programs take the places that those before
them leave, and wait there until all have ended and what they wrote can be read. It saves the time between two kernels.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch

from ds_offload.kernels.triton_runtime import HAS_TRITON, JITFunction, jit, tl

# CUDA 12.3, the first whose drivers know dependent launches in graphs.
CAPTURING_DRIVER = 12030


@jit
def follow():
    """Wait for the kernel before, where the launch is a dependent one.

    The first statement of every `step_kernel`: before it, memory may be neither read nor written. Every program waits,
    so a kernel that has ended has seen the end of all before it.
    """
    if tl.target_info.cuda_capability_geq(9, 0):
        tl.extra.cuda.gdc_wait()


class StepKernel:
    """A Triton kernel whose launches are dependent where the device has them; launched like any other.

    Args:
        kernel: As `triton.jit` made it; it begins with `follow()`.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        launch = self.kernel[grid]
        return partial(launch, launch_pdl=True) if self._dependent() else launch

    def _dependent(self) -> bool:
        # Triton's interpreter runs kernels on the CPU and knows no such option.
        return isinstance(self.kernel, JITFunction) and has_dependent_launches(torch.cuda.current_device())


def step_kernel(fn: Callable[..., Any] | None = None, **options: Any) -> Any:
    """`jit` for a kernel of a decode step; `options` are those of `triton.jit`."""
    if fn is None:
        return partial(step_kernel, **options)
    if not HAS_TRITON:
        return fn
    return StepKernel(jit(fn, **options))


@cache
def has_dependent_launches(device: int) -> bool:
    """Whether a device and its driver have them, inside of captured graphs too."""
    if torch.version.cuda is None or torch.cuda.get_device_capability(device) < (9, 0):
        return False
    version = ctypes.c_int(0)
    try:
        code = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        return False
    return code == 0 and version.value >= CAPTURING_DRIVER
