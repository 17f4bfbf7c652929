"""Copies of a prompt's rows between the device and a segment of the store, in the way that its memory wants."""

from __future__ import annotations

from torch import Tensor

from ds_offload.kernels.copy_rows import copy_rows
from ds_offload.memory import managed_memory


def within_reach(segment: Tensor) -> Tensor:
    """A segment as a tensor of the device, where it is managed memory, or as it is."""
    view = managed_memory.on_device(segment)
    return segment if view is None else view[: segment.nbytes].view(segment.dtype).view(segment.shape)


def exchange_rows(stored: Tensor, rows: Tensor, *, to_store: bool, on_host: bool) -> None:
    """Copy `rows` `[Hkv, n, 2, D]` to where a segment has them, or those to `rows`, on the current stream.

    Args:
        stored: Of a segment that is `within_reach` or page-locked, or of a CPU that computes.
        on_host: Whether the segment is host memory.
    """
    source, target = (rows, stored) if to_store else (stored, rows)
    if stored.device != rows.device:
        # One contiguous copy a head: a strided one would be staged on the host.
        for to, of in zip(target, source, strict=True):
            to.copy_(of, non_blocking=True)
    elif to_store and on_host and stored.is_cuda:
        copy_rows(source, target)
    else:
        target.copy_(source)
