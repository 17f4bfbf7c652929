"""What the GPU and its link can do, and how much host memory can be page-locked for it."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ds_offload.bench.limits import measure_limits
from ds_offload.errors import MemoryPlanError
from ds_offload.machine.bandwidth import Bandwidths, measure_bandwidths, measured_bandwidths
from ds_offload.machine.check import FAIL, OK, WARN, Check, reason_of
from ds_offload.machine.gpu import Gpu
from ds_offload.machine.pin_probe import probe_pinned
from ds_offload.memory import managed_memory
from ds_offload.notices import notice

NO_DEVICE = "not tried: no CUDA device in use"
# Of device memory in other hands, what is worth a warning.
_MUCH_BYTES = 1 << 30
_SLOW_GATHER = 0.6
_PIN_CURE = "Run `ulimit -l unlimited` first, start docker with --ulimit memlock=-1, or free host memory."


def gpu_checks(device: torch.device, *, pin_limit: int, pin_reason: str, quick: bool) -> Iterator[Check]:
    """Checks of a device, one after the other; some take seconds.

    Args:
        device: A CPU too: then one measured bandwidth, and a line for what was not tried.
        pin_limit: Most bytes to page-lock.
        pin_reason: What sets `pin_limit`.
        quick: Measure and page-lock nothing.
    """
    if device.type != "cuda":
        yield Check("pinned memory", OK, NO_DEVICE)
        yield _host_bandwidth(device, quick)
        return
    try:
        gpu = Gpu.of(device)
    except Exception as error:
        yield Check("gpu memory", FAIL, reason_of(error), "See whether nvidia-smi lists the GPU, and who uses it up.")
        return
    yield check_gpu_memory(gpu)
    yield check_managed(device)
    yield check_pinned(device, pin_limit, pin_reason, quick)
    yield check_bandwidths(device, quick)
    # Behind the copies: an idle GPU may have slowed its link down.
    try:
        yield check_link(Gpu.of(device))
    except Exception as error:
        yield Check("link", WARN, reason_of(error), "Look at the link with nvidia-smi --query --display=PERFORMANCE.")


def check_gpu_memory(gpu: Gpu) -> Check:
    """Device memory that is free, and what other processes hold of it."""
    value = f"{gpu.free_bytes / 2**30:.2f} of {gpu.total_bytes / 2**30:.2f} GiB are free"
    figures = {"free_bytes": gpu.free_bytes, "total_bytes": gpu.total_bytes, "others_bytes": gpu.others_bytes}
    if gpu.others_bytes:
        value += f", other processes hold {gpu.others_bytes / 2**30:.2f} GiB"
    taken = gpu.total_bytes - gpu.free_bytes if gpu.others_bytes is None else gpu.others_bytes
    if taken > _MUCH_BYTES:
        cure = "End other processes on this GPU (nvidia-smi lists them), or give --gpu-memory."
        return Check("gpu memory", WARN, value, cure, figures)
    return Check("gpu memory", OK, value, figures=figures)


def check_managed(device: torch.device) -> Check:
    """Whether the K/V can lie in managed memory, which the GPU reaches through large pages."""
    if managed_memory.supported(device):
        return Check(
            "managed memory", OK, "the K/V lies in it; the GPU maps it by 2 MiB where the system has such pages"
        )
    value = (
        "the GPU and the CPU cannot use it at once: the K/V is page-locked, and rows that lie far apart arrive slower"
    )
    cure = (
        "Inside WSL or a virtual GPU that cannot be changed; elsewhere update the driver to one of CUDA 12.2 or later."
    )
    return Check("managed memory", WARN, value, cure)


def check_pinned(device: torch.device, limit: int, reason: str, quick: bool) -> Check:
    """How much host memory was page-locked at once, up to `limit` bytes."""
    if quick:
        return Check("pinned memory", OK, "not tried: --quick")
    notice(f"page-locking host memory, up to {limit / 2**30:.2f} GiB")
    try:
        probe = probe_pinned(device, limit)
    except Exception as error:
        return Check("pinned memory", FAIL, reason_of(error), _PIN_CURE)
    pinned = f"{probe.pinned_bytes / 2**30:.2f} GiB were page-locked"
    figures = {"pinned_bytes": probe.pinned_bytes, "limit_bytes": limit}
    if probe.refusal is None:
        return Check("pinned memory", OK, f"{pinned}; more was not tried ({reason})", figures=figures)
    status = WARN if probe.pinned_bytes else FAIL
    return Check("pinned memory", status, f"{pinned}; then {probe.refusal}", _PIN_CURE, figures)


def check_bandwidths(device: torch.device, quick: bool) -> Check:
    """Bandwidths, measured now; with `quick` those that are kept from before."""
    if quick:
        kept = measured_bandwidths(device)
        if kept is None:
            return Check("bandwidth", OK, "not measured yet: --quick")
        return _judge(kept, ", measured before")
    notice("measuring the bandwidths of link and memory")
    try:
        return _judge(measure_bandwidths(device), "")
    except (MemoryPlanError, MemoryError) as error:
        return Check("bandwidth", FAIL, reason_of(error), _PIN_CURE)
    except Exception as error:
        return Check("bandwidth", FAIL, reason_of(error), "Run again with 2 GiB of GPU memory free.")


def _judge(rates: Bandwidths, when: str) -> Check:
    value = (
        f"{rates.link_gb_per_s:.1f} GB/s to the GPU, {rates.back_gb_per_s:.1f} GB/s back, sorted gather "
        f"{rates.gather_gb_per_s:.1f} GB/s, GPU memory {rates.memory_gb_per_s:.0f} GB/s{when}"
    )
    if rates.gather_gb_per_s < _SLOW_GATHER * rates.link_gb_per_s:
        cure = "Run again on an idle machine; if it stays so, host memory may be on another NUMA node than the GPU."
        return Check("bandwidth", WARN, f"{value}: the gather is far below the copy", cure, rates.to_dict())
    return Check("bandwidth", OK, value, figures=rates.to_dict())


def check_link(gpu: Gpu) -> Check:
    """Generation and width of the PCIe link, next to what the GPU is capable of."""
    link = gpu.link
    figures = {
        "generation": link.generation,
        "width": link.width,
        "max_generation": link.max_generation,
        "max_width": link.max_width,
    }
    if link.generation is None or link.width is None:
        return Check("link", OK, "unknown: neither sysfs nor nvidia-smi tells it", figures=figures)
    value = f"PCIe {link.generation} x{link.width}"
    if link.max_width is not None and link.width < link.max_width:
        cure = "Put the GPU into a slot with all lanes connected, without a riser or a second card that shares them."
        return Check("link", WARN, f"{value}, the GPU is capable of x{link.max_width}", cure, figures)
    if link.max_generation is not None and link.generation < link.max_generation:
        # At rest this is how power is saved, so it is no warning.
        value += f", the GPU is capable of PCIe {link.max_generation} (idle GPUs slow their link down)"
    return Check("link", OK, value, figures=figures)


def _host_bandwidth(device: torch.device, quick: bool) -> Check:
    if quick:
        return Check("bandwidth", OK, "not measured: --quick")
    limits = measure_limits(device)
    value = f"host memory: copying {limits.link / 1e9:.1f} GB/s, reading {limits.read / 1e9:.1f} GB/s"
    return Check("bandwidth", OK, value, figures=limits.to_dict())
