"""How long a request will take, from bandwidths and from what earlier runs have shown."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from ds_offload.kernels.select import select_launch
from ds_offload.loading import ModelSource
from ds_offload.memory.plan import CacheShape
from ds_offload.planning.request import Request, active_experts, weight_bytes

# Share of a step's selected rows that are still on the device, by `hot_set`; straight lines between.
HIT_RATES = ((0.0, 0.0), (1.25, 0.86), (2.0, 0.94), (4.0, 0.98))
# In exact mode, rows fetched in line and ahead for the next step, for every row that would be fetched in line without
# a look-ahead: 1.2 % and 2.9 % of a selection for 2.2 % (SmolLM2-135M, two texts; prefetch/selection.py).
IN_LINE, AHEAD = 1.2 / 2.2, 2.9 / 2.2
# What a layer of a captured step takes beyond its bytes: Llama-3.1-8B's shape at 16K tokens without copies on an H100
# and an H200 (docs/benchmarks.md); for each score where several programs share a row (Llama-2-7B's at 128K); and for
# each further sequence (a batch of 8 at 32K).
LAYER_OVERHEAD_S = 80e-6
LONG_SELECTION_S = 10e-12
SEQUENCE_OVERHEAD_S = 3e-6
# Label scores of grouped heads read the labels twice, and take as long as so many readings (at 512K, the same page).
GROUPED_READINGS = 4
# Rows far apart in host memory, the few that a hot set lacks: rows a second by how many of a KV head are missing, as
# whole decode steps of 1,024 KV heads showed it (H100, PCIe 5 x16; docs/benchmarks.md). Straight lines between, in
# logarithms. In managed memory more of them are bound by the link alone; in page-locked memory, whose pages are small
# to the device, by address translation.
FAR_ROWS = ((121, 80e6), (1000, 210e6))
FAR_LOCKED_ROWS = ((121, 29e6), (1000, 60e6), (8100, 95e6))
# Share of the device's dense bf16 rate that prefill is taken to reach.
PREFILL_SHARE = 0.6


@dataclass(frozen=True)
class Rates:
    """What a device moves and computes.

    Attributes:
        link_gb_per_s: Rows from the host: their gather where it was measured, else copies; in 10^9 bytes a second.
        memory_gb_per_s: Reading device memory.
        bf16_tflops: Dense 16-bit products, in 10^12 operations a second; None where it is not known.
        bandwidths_from, tflops_from: Where the figures come from.
        managed: Whether rows lie in managed memory (`memory/managed_memory.py`).
    """

    link_gb_per_s: float
    memory_gb_per_s: float
    bf16_tflops: float | None
    bandwidths_from: str
    tflops_from: str | None
    managed: bool = True


@dataclass(frozen=True)
class Estimate:
    """What a request is expected to take.

    Attributes:
        h2d_bytes_per_token: Row bytes from the store to the device, per new token and sequence.
        prefill_s: Seconds of all prompts.
        decode_ms_per_token: Milliseconds of a step.
        assumptions: What the figures rest on, and why one is None.
    """

    h2d_bytes_per_token: int
    prefill_s: float | None
    decode_ms_per_token: float | None
    assumptions: dict[str, Any]


def estimate(request: Request, rates: Rates | None) -> Estimate:
    """Times and traffic of a request at its longest context.

    A step reads weights, labels and rows from device memory, waits for the rows that are
    fetched in line, and spends a fixed time on each layer. Rows fetched ahead come while
    the rest runs, as far as the link has time for them.
    """
    shape = request.shape()
    on_device = shape.kv_on_device
    hits = 1.0 if on_device else hit_rate(request.config.hot_set_multiple, shape)
    # Per row that no earlier step left on the device.
    in_line, ahead = (IN_LINE, AHEAD) if shape.look_ahead else (0.0, 1.0) if shape.predicted else (1.0, 0.0)
    offloaded = shape.layers - shape.dense_layers
    missing_rows = shape.most_kept * (1 - hits)
    missing = offloaded * shape.kv_heads * missing_rows * shape.row_bytes
    moved = round(missing * (in_line + ahead))
    assumptions: dict[str, Any] = {
        "hot_set_hit_rate": None if on_device else round(hits, 3),
        "rows_in_line_per_miss": round(in_line, 3),
        "rows_ahead_per_miss": round(ahead, 3),
    }
    if shape.kv_on_disk:
        rows = round(moved / shape.row_bytes)
        assumptions["times"] = (
            f"none: each of the {rows:,} rows a token that are not on the device may be a read of the disk, "
            "and prefill writes all K/V there"
        )
        return Estimate(moved, None, None, assumptions)
    if rates is None:
        assumptions["times"] = "none: how fast this device is is not known; --gpu NAME takes published figures"
        return Estimate(moved, None, None, assumptions)
    assumptions |= {
        "link_gb_per_s": rates.link_gb_per_s,
        "memory_gb_per_s": rates.memory_gb_per_s,
        "bandwidths_from": rates.bandwidths_from,
        "layer_overhead_us": round(_layer_overhead(shape) * 1e6),
        "far_rows_per_s": round(far_rows_per_s(missing_rows, rates.managed)),
        "bf16_tflops": rates.bf16_tflops,
        "tflops_from": rates.tflops_from,
        "prefill_share_of_tflops": PREFILL_SHARE,
    }
    read = _weights_read(request.source, request.batch) + _rows_read(shape)
    # Seconds that a byte takes to the device, of all sequences: without a hot set rows are many and lie close.
    link = request.batch / (rates.link_gb_per_s * 1e9)
    if hits > 0:
        link = max(link, request.batch / (far_rows_per_s(missing_rows, rates.managed) * shape.row_bytes))
    step = read / (rates.memory_gb_per_s * 1e9) + link * missing * in_line + shape.layers * _layer_overhead(shape)
    step = max(step, link * moved)
    prefill = None
    if request.source.dtype == torch.float32:
        assumptions["prefill"] = "none: the rate of float32 products is not known"
    elif rates.bf16_tflops is None:
        assumptions["prefill"] = "none: the rate of this device's products is not known"
    else:
        counts = Counter(request.lengths)
        work = sum(count * prefill_flops(request.source, tokens) for tokens, count in counts.items())
        prefill = work / (rates.bf16_tflops * 1e12 * PREFILL_SHARE)
    return Estimate(moved, prefill, 1000 * step, assumptions)


def hit_rate(hot_set: float, shape: CacheShape) -> float:
    """The share of selected rows that an earlier step is expected to have left in a hot set."""
    if hot_set == 0:
        return 0.0
    if shape.hot_slots >= max(shape.capacities) - shape.window.forced_slots:
        # Every candidate has a slot.
        return 1.0
    for (low, below), (high, above) in itertools.pairwise(HIT_RATES):
        if hot_set <= high:
            return below + (above - below) * (hot_set - low) / (high - low)
    return HIT_RATES[-1][1]


def far_rows_per_s(missing: float, managed: bool = True) -> float:
    """Rows a second that arrive of those that a hot set lacks, `missing` of every KV head, where the link has room."""
    rates = FAR_ROWS if managed else FAR_LOCKED_ROWS
    if missing <= rates[0][0]:
        return rates[0][1]
    for (low, below), (high, above) in itertools.pairwise(rates):
        if missing <= high:
            return float(below * (above / below) ** (math.log(missing / low) / math.log(high / low)))
    return rates[-1][1]


def prefill_flops(source: ModelSource, tokens: int) -> float:
    """Operations of a prompt: two a weight and token, and exact causal attention's 4 * T^2 / 2 a channel."""
    shape = source.shape
    weights = _active(source, active_experts(source)) - shape.vocab_size * shape.hidden_size
    attention = 2 * tokens**2 * shape.heads * shape.head_dim * shape.layers
    return 2.0 * weights * tokens + attention


def _active(source: ModelSource, experts: int) -> int:
    """Parameters that are multiplied with: without the embeddings' table, of `experts` experts a layer."""
    shape = source.shape
    tied = bool(getattr(source.config, "tie_word_embeddings", False))
    count = shape.parameters - (0 if tied else shape.vocab_size * shape.hidden_size)
    total = getattr(source.config, "num_local_experts", None) or experts
    return count - shape.layers * max(0, total - experts) * 3 * shape.hidden_size * shape.intermediate_size


def _weights_read(source: ModelSource, batch: int) -> int:
    """Bytes of weights that a step reads; sequences may go through experts of their own."""
    most = getattr(source.config, "num_local_experts", None) or 1
    count = _active(source, min(most, batch * active_experts(source)))
    return min(weight_bytes(source), count * source.dtype.itemsize)


def _layer_overhead(shape: CacheShape) -> float:
    """Seconds that a layer takes beyond its bytes."""
    long = shape.scored and not select_launch(max(shape.capacities), shape.most_kept).block
    selection = LONG_SELECTION_S * shape.kv_heads * sum(shape.capacities) if long else 0.0
    return LAYER_OVERHEAD_S + SEQUENCE_OVERHEAD_S * (len(shape.capacities) - 1) + selection


def _rows_read(shape: CacheShape) -> int:
    """Bytes of labels and rows that a step reads from device memory, labels as often as their scores take."""
    offloaded, tokens = shape.layers - shape.dense_layers, sum(shape.capacities)
    attended = shape.rows * min(max(shape.capacities), shape.window.forced_slots + shape.most_kept)
    read = offloaded * attended * shape.row_bytes + shape.dense_layers * tokens * shape.kv_heads * shape.plain_row_bytes
    if shape.scored:
        passes = GROUPED_READINGS if shape.weighed else 1
        read += passes * offloaded * shape.kv_heads * tokens * shape.labels.row_bytes
    return read
