"""The device that a plan is for, here or not, and the memory that it may take."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass

import torch

from ds_offload.config import OffloadConfig
from ds_offload.devices import resolve_device
from ds_offload.errors import InputError
from ds_offload.machine.bandwidth import measured_bandwidths
from ds_offload.machine.published import PUBLISHED, PublishedGpu
from ds_offload.memory import managed_memory
from ds_offload.memory_check import memory_limits
from ds_offload.planning.estimate import Rates
from ds_offload.planning.request import MemoryLimits


@dataclass(frozen=True)
class Target:
    """Where a plan would run.

    Attributes:
        name: For people.
        cuda: Whether it is a CUDA device.
        limits: Bytes that may be taken there and on the host.
        rates: For times; None where nothing is known.
    """

    name: str
    cuda: bool
    limits: MemoryLimits
    rates: Rates | None


def find_target(config: OffloadConfig, device: str, gpu: str | None) -> Target:
    """The device that was asked for.

    A GPU that is not there is planned for with `gpu`, its name, or with `gpu_memory` alone
    where there is no CUDA device. `host_memory` then stands for that machine's host;
    without it, this one's counts. Of a device that is there, what is free counts, and
    `gpu_memory` only lowers it.

    Args:
        device: "auto", "cpu", "cuda" or "cuda:N".
        gpu: A name of `PUBLISHED`, or None.

    Raises:
        InputError: A GPU by another name, a GPU for the CPU, or a device that is not there.
    """
    if gpu is not None and gpu.lower() not in PUBLISHED:
        raise InputError(f"gpu={gpu!r} is not known; use one of {', '.join(PUBLISHED)}, or --gpu-memory BYTES")
    if gpu is not None and device.startswith("cpu"):
        raise InputError(f"gpu={gpu!r} and device={device!r} were both given; leave one of them out")
    missing = not torch.cuda.is_available() and not device.startswith("cpu")
    if gpu is None and not (missing and isinstance(config.gpu_memory, int)):
        return _here(config, resolve_device(device))
    host = config.host_memory
    here = memory_limits(config, torch.device("cpu"))
    if not isinstance(host, int):
        host = here.host
    asked = config.gpu_memory if isinstance(config.gpu_memory, int) else None
    if gpu is None:
        assert asked is not None
        return Target("a CUDA device that is not here", True, MemoryLimits(asked, host, here.disk), None)
    published = PUBLISHED[gpu.lower()]
    memory = published.memory_bytes if asked is None else min(asked, published.memory_bytes)
    return Target(published.name, True, MemoryLimits(memory, host, here.disk), _published_rates(published))


def _here(config: OffloadConfig, device: torch.device) -> Target:
    limits = memory_limits(config, device)
    if device.type == "cpu":
        return Target("cpu", False, limits, None)
    name = torch.cuda.get_device_name(device)
    published = published_gpu(name)
    rates = None if published is None else _published_rates(published)
    measured = measured_bandwidths(device)
    if measured is not None:
        compute = (None, None) if rates is None else (rates.bf16_tflops, rates.tflops_from)
        rates = Rates(measured.gather_gb_per_s, measured.memory_gb_per_s, compute[0], "measured here", compute[1])
    if rates is not None:
        rates = dataclasses.replace(rates, managed=managed_memory.supported(device))
    return Target(name, True, limits, rates)


def published_gpu(name: str) -> PublishedGpu | None:
    """The published figures of the device that a driver calls `name`, such as "NVIDIA A100-SXM4-80GB"."""
    words = re.split(r"[\s-]+", name.lower().replace("rtx ", "rtx"))
    return next((gpu for key, gpu in PUBLISHED.items() if key in words), None)


def _published_rates(gpu: PublishedGpu) -> Rates:
    source = f"published figures of {gpu.name}"
    return Rates(gpu.link_gb_per_s, gpu.memory_gb_per_s, gpu.bf16_tflops, source, source)
