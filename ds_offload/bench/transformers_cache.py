"""transformers' own offloaded cache on the same model: one decode step at the same context."""

from __future__ import annotations

import time

import psutil
import torch
from torch import Tensor
from transformers import DynamicCache

from ds_offload.bench.decode_steps import next_tokens, time_each
from ds_offload.bench.report import BenchRow
from ds_offload.loading import LoadedModel

LONGEST_STEP_S = 20.0
WARM_UPS = 1
STEPS = 3
PROBE_BYTES = 256 << 20


@torch.no_grad()
def transformers_row(loaded: LoadedModel, sequences: int, tokens: int) -> BenchRow | str:
    """Time `DynamicCache(offloading=True)`, filled with random K/V.

    Every step it copies each layer's K/V to the device and back, both through pageable memory.

    Returns:
        The row, or why there is none: no CUDA device, too little memory, or steps
        that would take longer than `LONGEST_STEP_S`.
    """
    if loaded.device.type != "cuda":
        return "transformers' offloaded cache was left out: it needs a CUDA device"
    shape = loaded.source.shape
    head_row = 2 * shape.head_dim * loaded.source.dtype.itemsize
    cache_bytes = shape.layers * sequences * shape.kv_heads * tokens * head_row
    # A layer that is written back exists twice.
    needed, there = cache_bytes * 1.1, psutil.virtual_memory().available
    if needed > there:
        return (
            f"transformers' offloaded cache was left out: it needs {needed / 2**30:.1f} GiB of host memory "
            f"and {there / 2**30:.1f} GiB are there"
        )
    expected = cache_bytes * _seconds_per_byte(loaded.device)
    if expected > LONGEST_STEP_S:
        return (
            f"transformers' offloaded cache was left out: a step would take about {expected:.0f} s to copy "
            f"{cache_bytes / 2**30:.1f} GiB to the device and back; the most is {LONGEST_STEP_S:.0f} s"
        )
    cache = _filled(loaded, sequences, tokens)
    last = torch.zeros(sequences, 1, dtype=torch.int64, device=loaded.device)

    def step() -> None:
        logits: Tensor = loaded.model(input_ids=last, past_key_values=cache, use_cache=True).logits
        next_tokens(logits[:, -1])

    for _ in range(WARM_UPS):
        step()
    timing, cpu_use = time_each(step, STEPS)
    return BenchRow.of("transformers", timing, "ms", cache_bytes=cache_bytes, steps=STEPS, cpu_use=cpu_use)


def _seconds_per_byte(device: torch.device) -> float:
    """Seconds that a byte takes to the device and back through pageable memory."""
    host = torch.ones(PROBE_BYTES, dtype=torch.uint8)
    host.to(device).cpu()
    torch.cuda.synchronize(device)
    started = time.perf_counter()
    host.to(device).cpu()
    return (time.perf_counter() - started) / PROBE_BYTES


def _filled(loaded: LoadedModel, sequences: int, tokens: int) -> DynamicCache:
    shape = loaded.source.shape
    cache = DynamicCache(offloading=True)
    rows = (sequences, shape.kv_heads, tokens, shape.head_dim)
    for layer in range(shape.layers):
        key, value = (
            torch.empty(rows, dtype=loaded.source.dtype, device=loaded.device).normal_(0, 0.1) for _ in range(2)
        )
        cache.update(key, value, layer)
    torch.cuda.synchronize(loaded.device)
    return cache
