"""The figures of one run: times, bytes over the link, hit rates, memory."""

from __future__ import annotations

import time
from typing import Any

import torch

from ds_offload.config import OffloadConfig
from ds_offload.decoder import DecoderStack
from ds_offload.kv_context import KVContext
from ds_offload.memory.plan import MemoryPlan
from ds_offload.monitor import FidelityMonitor
from ds_offload.prefetch.traffic import Traffic

# Of a run on CUDA the first step runs eagerly, which compiles its kernels, and the second is captured.
FIRST_STEPS = 2


class RunStatistics:
    """Measures one `generate` or `stream` call. Times are wall-clock seconds with the device idle at both ends."""

    def __init__(self, decoder: DecoderStack, config: OffloadConfig) -> None:
        self._device = decoder.device
        self._layers = decoder.layers
        self._dense = len(config.dense_layers)
        self._figures: dict[str, Any] = {}
        self._steps = 0
        self._sequences = 1
        self._density = 0.0
        self._kv_heads = decoder.kv_heads
        self._forced = 0
        self._started = 0.0
        self._decode_s = 0.0
        self._first_s = 0.0
        self._first_stall: list[int] = []
        self._planned = 0

    def begin(self, plan: MemoryPlan) -> None:
        """The prompts are known and planned for; work begins."""
        self._planned = plan.gpu_tensors if self._device.type == "cuda" else 0
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            torch.cuda.synchronize(self._device)
        self._started = time.perf_counter()

    def prefilled(self) -> None:
        """Every prompt's first new token is there; the last layers' rows may be on their way to the store."""
        now = time.perf_counter()
        self._figures["prefill_s"] = now - self._started
        self._started = now

    def stepped(self, context: KVContext, lengths: list[int], between_s: float = 0.0) -> None:
        """One decode step has given its tokens; `between_s` seconds were spent between steps so far, not in them."""
        self._steps += 1
        self._sequences = len(lengths)
        self._forced += sum(context.window.forced(length) for length in lengths)
        shares = [context.kept_tokens(length) / length for length in lengths]
        sparse = sum(shares) / len(shares)
        self._density += (sparse * (self._layers - self._dense) + self._dense) / self._layers
        # Sampling has read the step's logits, so the device is done with it.
        self._decode_s = time.perf_counter() - self._started - between_s
        if self._steps <= FIRST_STEPS:
            self._first_s = self._decode_s
        if self._steps == FIRST_STEPS:
            link = context.scheduler.timer.total()
            self._first_stall = link.stall if link is not None else []

    def finish(self, context: KVContext, capture_s: float | None, monitor: FidelityMonitor | None = None) -> None:
        """The last token is there and the context still is; `capture_s` is what the CUDA graph took."""
        layers = context.scheduler.traffic()
        traffic = Traffic.total(layers)
        link = context.scheduler.timer.total()
        tokens = self._steps * self._sequences
        hot = context.hot_set is not None
        row_bytes = context.store.row_bytes

        # Where there are others, times of a step are those of the steps behind the first ones.
        skipped = FIRST_STEPS if self._steps > FIRST_STEPS else 0
        timed, first_s = self._steps - skipped, self._first_s if skipped else 0.0
        stall = link.stall if link is not None else None
        if stall is not None and skipped:
            stall = [total - first for total, first in zip(stall, self._first_stall, strict=True)]

        def per_token(value: float) -> float | None:
            return value / tokens if tokens else None

        # Selections are counted where they are admitted to the hot set.
        kept = [
            per_token(layer.selected / self._kv_heads + self._forced) if hot and n in context.store else None
            for n, layer in enumerate(layers)
        ]
        counted = [count for count in kept if count is not None]

        self._figures |= {
            "decode_ms_per_token": 1000 * (self._decode_s - first_s) / timed if timed else None,
            "first_steps_s": self._first_s if self._steps else None,
            "graph_capture_s": capture_s,
            "h2d_bytes_per_token": traffic.moved * row_bytes // tokens if tokens else 0,
            "link_gb_per_s": _rate(traffic.moved * row_bytes, sum(link.busy)) if link else None,
            "stall_ms_per_token": _milliseconds(sum(stall), timed) if stall is not None else None,
            "hot_set_hit_rate": traffic.hit_rate if hot else None,
            "prefetch_recall": traffic.recall,
            "monitor": monitor.summary() if monitor is not None else None,
            "kept_tokens": sum(counted) / len(counted) if counted else None,
            "mean_density": self._density / self._steps if self._steps else None,
            "gpu_peak_bytes": torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else 0,
            "gpu_planned_bytes": self._planned,
            "host_pinned_bytes": context.pinned_bytes,
            "host_kv_bytes": context.host_bytes,
            "disk_kv_bytes": context.disk_bytes,
            "label_bytes": context.labels.nbytes,
            "layers": {
                "h2d_bytes_per_token": [per_token(layer.moved * row_bytes) for layer in layers],
                "link_gb_per_s": [
                    _rate(layer.moved * row_bytes, link.busy[n]) if link else None for n, layer in enumerate(layers)
                ],
                "stall_ms_per_token": [
                    _milliseconds(stall[n], timed) if stall is not None else None for n in range(len(layers))
                ],
                "hot_set_hit_rate": [layer.hit_rate if hot else None for layer in layers],
                "prefetch_recall": [layer.recall for layer in layers],
                "kept_tokens": kept,
            },
        }

    def summary(self) -> dict[str, Any]:
        """The figures by name; None where a run had nothing to measure."""
        return dict(self._figures)


def _rate(count: int, nanoseconds: int) -> float | None:
    """Bytes per nanosecond, which is GB/s."""
    return count / nanoseconds if nanoseconds else None


def _milliseconds(nanoseconds: int, steps: int) -> float | None:
    """The mean of one step."""
    return nanoseconds / 1e6 / steps if steps else None
