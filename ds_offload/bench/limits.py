"""What the link and the memory allow: bandwidths measured on this machine."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import torch

from ds_offload.memory.pinned_pool import PinnedPool

LINK_BYTES = 256 << 20
DEVICE_BYTES = 1 << 30
HOST_BYTES = 64 << 20
REPEATS = 10


@dataclass(frozen=True)
class Limits:
    """Measured bandwidths in bytes a second; the best of several repeats each.

    Attributes:
        link: Host to device: copies of 256 MiB from pinned memory. On a CPU: memcpy,
            its bytes counted once.
        read: Reading device memory: the faster of torch's `sum` and `amax` over 1 GiB. On
            a CPU: `sum` over 64 MiB.
        copy: Reading and writing device memory: `copy_`, its bytes counted twice.
    """

    link: float
    read: float
    copy: float

    def link_s(self, nbytes: float) -> float:
        """Seconds that `nbytes` take over the link at its measured peak."""
        return nbytes / self.link

    def memory_s(self, nbytes: float) -> float:
        """Seconds that `nbytes` take from device memory at the faster of the two measured bandwidths."""
        return nbytes / max(self.read, self.copy)

    def to_dict(self) -> dict[str, float]:
        """Plain values for JSON, in bytes a second."""
        return {f"{name}_bytes_per_s": value for name, value in asdict(self).items()}


@functools.cache
def measure_limits(device: torch.device) -> Limits:
    """The limits of `device`, measured at the first call of this process."""
    return _measure_cuda(device) if device.type == "cuda" else _measure_cpu()


def _measure_cuda(device: torch.device) -> Limits:
    with PinnedPool(device) as pool:
        host = pool.allocate(LINK_BYTES)
        target = torch.empty(LINK_BYTES, dtype=torch.uint8, device=device)
        link = LINK_BYTES / _best_on_device(device, partial(target.copy_, host, non_blocking=True))
    source = torch.ones(DEVICE_BYTES // 4, device=device)
    read = DEVICE_BYTES / min(_best_on_device(device, source.sum), _best_on_device(device, source.amax))
    copy = 2 * DEVICE_BYTES / _best_on_device(device, partial(torch.empty_like(source).copy_, source))
    return Limits(link, read, copy)


def _best_on_device(device: torch.device, call: Callable[[], object]) -> float:
    seconds = []
    for _ in range(REPEATS):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        call()
        last.record()
        torch.cuda.synchronize(device)
        seconds.append(first.elapsed_time(last) / 1000)
    return min(seconds)


def _measure_cpu() -> Limits:
    source = torch.ones(HOST_BYTES // 4)
    target = torch.empty_like(source)
    moved = HOST_BYTES / _best_on_host(partial(target.copy_, source))
    return Limits(link=moved, read=HOST_BYTES / _best_on_host(source.sum), copy=2 * moved)


def _best_on_host(call: Callable[[], object]) -> float:
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return min(seconds)
