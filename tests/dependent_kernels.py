"""Kernels that show whether a dependent launch waits: one that is late, and two that read what it writes."""

from __future__ import annotations

from ds_offload.kernels.dependent_launch import follow, step_kernel
from ds_offload.kernels.triton_runtime import tl


@step_kernel
def late_kernel(out, value, nanoseconds):
    """Write `value` to 32 numbers of each program, `nanoseconds` after it let the next kernel begin."""
    follow()
    tl.extra.cuda.gdc_launch_dependents()
    began = tl.extra.cuda.globaltimer()
    while tl.extra.cuda.globaltimer() - began < nanoseconds:
        pass
    tl.store(out + tl.program_id(0) * 32 + tl.arange(0, 32), tl.zeros([32], tl.int32) + value)


@step_kernel
def reading_kernel(of, out):
    """Copy 32 numbers."""
    follow()
    index = tl.program_id(0) * 32 + tl.arange(0, 32)
    tl.store(out + index, tl.load(of + index))


@step_kernel
def hasty_kernel(of, out):
    """`reading_kernel` without the wait: what no kernel of a step may be."""
    index = tl.program_id(0) * 32 + tl.arange(0, 32)
    tl.store(out + index, tl.load(of + index))
