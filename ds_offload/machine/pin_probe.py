"""How much host memory can really be page-locked, found by doing it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ds_offload.errors import MemoryPlanError
from ds_offload.memory.pinned_pool import PinnedPool

FIRST_BYTES = 256 << 20
SMALLEST_BYTES = 64 << 20


@dataclass(frozen=True)
class PinProbe:
    """What was page-locked at once, in bytes, and why not more: the refusal, or None where the limit was reached."""

    pinned_bytes: int
    refusal: str | None


def probe_pinned(device: torch.device, limit: int) -> PinProbe:
    """Page-lock more and more memory for a CUDA device, doubling, up to `limit` bytes; all of it is released at once.

    After a refusal smaller steps are tried, down to 64 MiB.

    Raises:
        ValueError: `limit` below 1.
    """
    if limit < 1:
        raise ValueError(f"limit={limit} must be at least 1 byte")
    pinned, refusal, step = 0, None, FIRST_BYTES
    with PinnedPool(device) as pool:
        while pinned < limit and step >= min(SMALLEST_BYTES, limit):
            step = min(step, limit - pinned)
            try:
                pool.allocate(step)
            except (MemoryPlanError, MemoryError) as error:
                refusal = str(error)
                step //= 2
                continue
            pinned += step
            step = step // 2 if refusal else max(FIRST_BYTES, pinned)
    return PinProbe(pinned, refusal)
