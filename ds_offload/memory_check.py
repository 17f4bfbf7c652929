"""Refuses what will not fit, in one line, before memory is taken for it."""

from __future__ import annotations

import dataclasses

import torch

from ds_offload.config import OffloadConfig
from ds_offload.errors import MemoryPlanError
from ds_offload.loading import LoadedModel, ModelSource
from ds_offload.machine.host_memory import host_memory
from ds_offload.memory.file_segments import disk_room
from ds_offload.memory.plan import CUDA_RESERVE_BYTES, MemoryPlan
from ds_offload.planning.changes import disk_instead, find_changes, kv_dir_hint, longest_context, settle
from ds_offload.planning.request import MemoryLimits, Request, Shortage, memory_text, weight_bytes
from ds_offload.planning.request import plan_request as plan_request


def memory_limits(config: OffloadConfig, device: torch.device, loaded: int = 0, kept: int = 0) -> MemoryLimits:
    """What may be taken of the memory that is free, on `device` and on the host.

    Args:
        config: `gpu_memory` and `host_memory` lower the limits; the disk is that of `kv_dir`.
        loaded: Bytes of weights that are on `device` already; a plan counts them, so the limit does, too.
        kept: Bytes on the host that an earlier call left for this one (`KeptBlocks`).

    Raises:
        InputError: `kv_dir` is no folder for files of segments.
    """
    disk = None if config.kv_dir is None else disk_room(config.kv_dir)
    if device.type == "cuda":
        return MemoryLimits(_gpu_limit(config, device, loaded), _host_limit(config, kept), disk)
    return MemoryLimits(None, _host_limit(config, loaded + kept), disk)


def check_weights(source: ModelSource, config: OffloadConfig, device: torch.device) -> None:
    """Refuse weights that do not fit the device.

    Raises:
        MemoryPlanError: They do not; nothing has been loaded.
    """
    limits = memory_limits(config, device)
    needed = weight_bytes(source)
    if limits.gpu is not None:
        needed += CUDA_RESERVE_BYTES
    place, limit = ("host memory", limits.host) if limits.gpu is None else ("GPU memory", limits.gpu)
    if needed > limit:
        short = Shortage(place, needed, limit)
        raise MemoryPlanError(_line("the weights", short, short.last_resort(config)))


def check_memory(
    source: ModelSource,
    config: OffloadConfig,
    device: torch.device,
    prompts: list[int],
    capacities: list[int],
    loaded: int = 0,
    continued: bool = False,
    shared: int = 0,
    kept: int = 0,
) -> MemoryPlan:
    """The plan of a call, refused if it does not fit.

    Args:
        config: Resolved for the model; a hot set that is not chosen is taken as `settle_config` chooses it.
        prompts: Tokens of each prompt.
        capacities: Most tokens of each sequence, prompt and answer.
        loaded: Bytes of weights that are on `device` already.
        continued: Whether the sequences are continued later, by prompts of any length.
        shared: Bytes of the store, on the host or in files, that are there already.
        kept: As for `memory_limits`.

    Raises:
        MemoryPlanError: GPU or host memory is short; names what is needed, what is there
            and the smallest change that makes it fit.
    """
    limits = memory_limits(config, device, loaded, kept)
    if limits.disk is None:
        limits = dataclasses.replace(limits, host=limits.host + shared)
    else:
        limits = dataclasses.replace(limits, disk=limits.disk + shared)
    request = settle(_request(source, config, device, prompts, capacities, continued), limits)
    plan = request.plan(limits.gpu)
    short = limits.shortage(plan)
    if short is not None:
        raise MemoryPlanError(_line(f"{sum(capacities):,} tokens", short, _remedy(request, limits, short)))
    return plan


def settle_config(
    source: ModelSource,
    config: OffloadConfig,
    device: torch.device,
    prompts: list[int],
    capacities: list[int],
    loaded: int = 0,
    continued: bool = False,
    kept: int = 0,
) -> OffloadConfig:
    """The config of one call with what the memory that is free decides; see `check_memory`."""
    limits = memory_limits(config, device, loaded, kept)
    return settle(_request(source, config, device, prompts, capacities, continued), limits).config


def _request(
    source: ModelSource,
    config: OffloadConfig,
    device: torch.device,
    prompts: list[int],
    capacities: list[int],
    continued: bool,
) -> Request:
    return Request(source, config, device.type == "cuda", len(prompts), tuple(prompts), tuple(capacities), continued)


def check_request(
    loaded: LoadedModel,
    config: OffloadConfig,
    prompts: list[int],
    capacities: list[int],
    *,
    continued: bool = False,
    shared: int = 0,
    kept: int = 0,
) -> MemoryPlan:
    """The plan of a call, refused if its caches do not fit, the weights being loaded already; see `check_memory`.

    Raises:
        MemoryPlanError: GPU or host memory is short.
    """
    source = loaded.source
    weights = weight_bytes(source)
    return check_memory(source, config, loaded.device, prompts, capacities, weights, continued, shared, kept)


def _gpu_limit(config: OffloadConfig, device: torch.device, loaded: int = 0) -> int:
    free, _ = torch.cuda.mem_get_info(device)
    there = free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if loaded:
        # Kernels and libraries that came with the weights have taken a part of the reserve.
        there += loaded + CUDA_RESERVE_BYTES // 2
    return min(there, config.gpu_memory) if isinstance(config.gpu_memory, int) else there


def _host_limit(config: OffloadConfig, there: int = 0) -> int:
    """Bytes that may be taken on the host, `there` of them taken already."""
    usable = host_memory().usable_bytes + there
    return min(usable, config.host_memory) if isinstance(config.host_memory, int) else usable


def _remedy(request: Request, limits: MemoryLimits, short: Shortage) -> str:
    flags = find_changes(request, limits)
    files = kv_dir_hint(disk_instead(request, limits))
    if flags:
        return f"{' '.join(flags)} makes it fit{files}"
    longest = longest_context(dataclasses.replace(request, prompts=None, most=None), limits, request.context)
    if longest:
        each = " each" if request.batch > 1 else ""
        return f"shorten the prompt: at most {longest:,} tokens{each} fit, the answer counted{files}"
    window = request.config.sink_tokens + request.config.recent_tokens
    if window > request.context:
        return f"lower sink_tokens and recent_tokens, together {window:,} and more than max_context={request.context:,}"
    return short.last_resort(request.config) + files


def _line(what: str, short: Shortage, remedy: str) -> str:
    field = {"GPU memory": "gpu_memory", "host memory": "host_memory", "disk": "kv_dir"}[short.place]
    needed, limit = memory_text(short.needed), memory_text(short.limit)
    return f"{what} need {needed} of {short.place} and {limit} are there ({field}); {remedy}"
