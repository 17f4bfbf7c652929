"""Bandwidths of a GPU and its link, measured on this machine and kept for later plans."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import secrets
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ds_offload.bench.limits import LINK_BYTES, measure_limits
from ds_offload.bench.timing import Stopwatch
from ds_offload.cache_folder import cache_folder
from ds_offload.machine.gpu import driver_version
from ds_offload.memory.kv_store import KVStore
from ds_offload.memory.pinned_pool import PinnedPool
from ds_offload.notices import warn

FORMAT = 1
SAMPLES = 10
# The gather: K and V of 128 channels in bf16, 32 KV heads, one token in 16 of 64K: 64 MiB a call.
KV_HEADS, HEAD_DIM, TOKENS, KEPT = 32, 128, 1 << 16, 1 << 12
SEGMENT_TOKENS = 1024
# As many lists of tokens as calls in a sample, so that none finds what the one before it read in a cache.
LISTS = 4
_LARGEST_FILE = 1 << 16


@dataclass(frozen=True)
class Bandwidths:
    """Measured rates in GB/s, 10^9 bytes a second.

    Attributes:
        link_gb_per_s: Copies of 256 MiB from pinned memory to the device, the best of several.
        back_gb_per_s: The same from the device to pinned memory, the median.
        gather_gb_per_s: `gather_rows` of ascending rows of 512 bytes from pinned memory, the median.
        memory_gb_per_s: Device memory: the faster of reading and copying, the best of several.
    """

    link_gb_per_s: float
    back_gb_per_s: float
    gather_gb_per_s: float
    memory_gb_per_s: float

    def to_dict(self) -> dict[str, float]:
        """Plain values for JSON."""
        return asdict(self)


def measured_bandwidths(device: torch.device) -> Bandwidths | None:
    """What `measure_bandwidths` found on this GPU with this driver; None on a CPU, and where nothing (sound) is kept.

    Nothing is measured.
    """
    if device.type != "cuda":
        return None
    name, driver = torch.cuda.get_device_name(device), driver_version()
    return read_bandwidths(bandwidth_file(name, driver), name, driver)


def measure_bandwidths(device: torch.device) -> Bandwidths:
    """Measure a CUDA device, and keep the result in the cache folder; takes some seconds.

    Needs about 1.3 GiB of pinned memory and 2 GiB of device memory.

    Raises:
        ValueError: `device` is no CUDA device.
        MemoryPlanError: The driver refused to page-lock memory.
    """
    if device.type != "cuda":
        raise ValueError(f"bandwidths of {device} were asked for; they are measured on a CUDA device")
    with torch.cuda.device(device):
        limits = measure_limits(device)
        watch = Stopwatch(device, SAMPLES)
        measured = Bandwidths(
            link_gb_per_s=limits.link / 1e9,
            back_gb_per_s=_copy_back(device, watch) / 1e9,
            gather_gb_per_s=_gather(device, watch) / 1e9,
            memory_gb_per_s=max(limits.read, limits.copy) / 1e9,
        )
    name, driver = torch.cuda.get_device_name(device), driver_version()
    write_bandwidths(measured, bandwidth_file(name, driver), name, driver)
    return measured


def bandwidth_file(name: str, driver: str | None) -> Path:
    """Where the bandwidths of a GPU with a driver are kept."""
    words = re.sub(r"[^a-z0-9.]+", "-", f"{name} {driver or 'unknown'}".lower()).strip("-")
    return cache_folder() / "machine" / f"{words}.json"


def read_bandwidths(path: Path, name: str, driver: str | None) -> Bandwidths | None:
    """The bandwidths in a file; None where there is none, or it is damaged, foreign or of another version."""
    try:
        if path.stat().st_size > _LARGEST_FILE:
            return None
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        return None
    if content.get("device") != name or content.get("driver") != driver:
        return None
    rates: list[Any] = [content.get(field.name) for field in fields(Bandwidths)]
    return Bandwidths(*rates) if all(_is_rate(rate) for rate in rates) else None


def write_bandwidths(measured: Bandwidths, path: Path, name: str, driver: str | None) -> None:
    """Write a file in one step: it is there whole or not at all. A folder that cannot be written is said, no more."""
    content = {"format": FORMAT, "device": name, "driver": driver} | measured.to_dict()
    temporary = path.with_name(f".bandwidths-{secrets.token_hex(8)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        warn(f"the measured bandwidths are not kept: cannot write {path} ({error.strerror}); set DS_OFFLOAD_CACHE")
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _is_rate(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _copy_back(device: torch.device, watch: Stopwatch) -> float:
    """Bytes a second from the device to pinned memory."""
    with PinnedPool(device) as pool:
        target = pool.allocate(LINK_BYTES)
        source = torch.zeros(LINK_BYTES, dtype=torch.uint8, device=device)
        return LINK_BYTES / watch.time([partial(target.copy_, source, non_blocking=True)]).median


def _gather(device: torch.device, watch: Stopwatch) -> float:
    """Bytes a second of rows gathered from host memory in place."""
    with PinnedPool(device, in_place=True) as pool:
        store = KVStore(
            layers=range(1),
            sequences=1,
            kv_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            dtype=torch.bfloat16,
            device=device,
            pool=pool,
            segment_tokens=SEGMENT_TOKENS,
            max_tokens=TOKENS,
        )
        try:
            store.reserve(0, TOKENS)
            out = torch.empty(1, KV_HEADS, KEPT, 2, HEAD_DIM, dtype=torch.bfloat16, device=device)
            slots = torch.arange(KEPT, device=device).expand(1, KV_HEADS, KEPT).contiguous()
            lists = [_ascending_tokens(seed).to(device) for seed in range(LISTS)]
            timing = watch.time([partial(store.gather, 0, tokens, slots, out) for tokens in lists])
            return out.nbytes / timing.median
        finally:
            # The pool is about to take the memory away.
            store.table.tensors.clear()


def _ascending_tokens(seed: int) -> torch.Tensor:
    """Distinct ascending tokens `[1, KV_HEADS, KEPT]` int64, drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(1, KV_HEADS, TOKENS, generator=generator).topk(KEPT, -1).indices
    return drawn.sort(-1).values
