"""The figures of one run: times, bytes over the link, hit rates, memory."""

from __future__ import annotations

import time
from typing import Any

import torch

from ds_offload.config import OffloadConfig
from ds_offload.decoder import DecoderStack
from ds_offload.kv_context import KVContext
from ds_offload.memory.plan import MemoryPlan


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
        self._started = 0.0
        self._decode_s = 0.0
        self._planned = 0

    def begin(self, plan: MemoryPlan) -> None:
        """The prompts are known and planned for; work begins."""
        self._planned = plan.gpu_tensors if self._device.type == "cuda" else 0
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        self._started = self._now()

    def prefilled(self) -> None:
        """Every prompt's first new token is there."""
        now = self._now()
        self._figures["prefill_s"] = now - self._started
        self._started = now

    def stepped(self, context: KVContext, lengths: list[int]) -> None:
        """One decode step has given its tokens."""
        self._steps += 1
        self._sequences = len(lengths)
        shares = [context.kept_tokens(length) / length for length in lengths]
        sparse = sum(shares) / len(shares)
        self._density += (sparse * (self._layers - self._dense) + self._dense) / self._layers
        # Sampling has read the step's logits, so the device is done with it.
        self._decode_s = time.perf_counter() - self._started

    def finish(self, context: KVContext, capture_s: float | None) -> None:
        """The last token is there and the context still is; `capture_s` is what the CUDA graph took."""
        traffic = context.scheduler.traffic()
        steps = self._steps
        self._figures |= {
            "decode_ms_per_token": 1000 * self._decode_s / steps if steps else None,
            "graph_capture_s": capture_s,
            "h2d_bytes_per_token": traffic.moved * context.store.row_bytes // (steps * self._sequences) if steps else 0,
            "hot_set_hit_rate": traffic.old / traffic.selected if context.hot_set and traffic.selected else None,
            "prefetch_recall": traffic.recalled / traffic.predicted if traffic.predicted else None,
            "mean_density": self._density / steps if steps else None,
            "gpu_peak_bytes": torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else 0,
            "gpu_planned_bytes": self._planned,
            "host_pinned_bytes": context.pinned_bytes,
            "host_kv_bytes": context.host_bytes,
            "label_bytes": context.labels.nbytes,
        }

    def summary(self) -> dict[str, Any]:
        """The figures by name; None where a run had nothing to measure."""
        return dict(self._figures)

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
