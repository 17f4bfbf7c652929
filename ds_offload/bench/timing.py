"""Repeated timings of one piece of work, and their percentiles."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

WARM_UPS = 3
# A flush reads this many times the level 2 cache.
FLUSH_SHARE = 4


@dataclass(frozen=True)
class Timing:
    """Percentiles of repeated timings, in seconds."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        """The percentiles of `samples`, at least one."""
        return cls(percentile(samples, 0.5), percentile(samples, 0.2), percentile(samples, 0.8))


def percentile(samples: Sequence[float], share: float) -> float:
    """The value below which `share` of the samples lie, interpolated between neighbours.

    Raises:
        ValueError: No samples.
    """
    if not samples:
        raise ValueError("percentiles need at least one sample; none was given")
    ordered = sorted(samples)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


class Stopwatch:
    """Times calls on one device.

    On CUDA the calls are captured in one graph, in order, and each sample is a replay between two events, so
    neither launches nor Python count. In front of each sample the level 2 cache is filled
    with other data by reading it, which leaves nothing to write back. Calls that
    share a graph should work on different inputs, so that one finds nothing that the one
    before it read. On a CPU each sample is the wall time of the calls.

    Args:
        device: Where the calls run.
        samples: Samples a timing is made of, at least 1.
    """

    def __init__(self, device: torch.device, samples: int) -> None:
        self.device = device
        self._samples = samples
        self._flush: Tensor | None = None
        if device.type == "cuda":
            cache = torch.cuda.get_device_properties(device).L2_cache_size
            self._flush = torch.zeros(FLUSH_SHARE * cache // 4, dtype=torch.int32, device=device)

    def time(self, calls: Sequence[Callable[[], object]], *, capture: bool = True) -> Timing:
        """The time of one call: that of all of them over their number.

        Args:
            calls: What to time, at least one; each call leaves its inputs as they were.
            capture: False on CUDA for calls that wait for the device: they run eagerly,
                and a sample holds the time that the device waits for the host.
        """
        for _ in range(WARM_UPS):
            for call in calls:
                call()
        if self.device.type != "cuda":
            return self._time_on_host(calls)
        torch.cuda.synchronize(self.device)
        if not capture:
            return self._time_on_device(lambda: [call() for call in calls], len(calls))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            # Kept until the capture ends: a tensor let go would be written again by the next call.
            results = [call() for call in calls]
        graph.replay()
        timing = self._time_on_device(graph.replay, len(calls))
        del results
        return timing

    def _time_on_host(self, calls: Sequence[Callable[[], object]]) -> Timing:
        samples = []
        for _ in range(self._samples):
            started = time.perf_counter()
            for call in calls:
                call()
            samples.append((time.perf_counter() - started) / len(calls))
        return Timing.of(samples)

    def _time_on_device(self, run: Callable[[], object], calls: int) -> Timing:
        assert self._flush is not None
        spans = []
        for _ in range(self._samples):
            self._flush.amax()
            span = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            span[0].record()
            run()
            span[1].record()
            spans.append(span)
        torch.cuda.synchronize(self.device)
        return Timing.of([first.elapsed_time(last) / 1000 / calls for first, last in spans])
