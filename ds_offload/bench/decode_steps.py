"""Decode steps of a context, timed one by one."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_offload.bench.timing import Timing
from ds_offload.decode import DecodeLoop
from ds_offload.decoder import DecoderStack
from ds_offload.kv_context import KVContext
from ds_offload.prefetch.traffic import Traffic


@dataclass(frozen=True)
class StepTimes:
    """What timed steps took and moved.

    Attributes:
        timing: Of a step, the host's reading of the new tokens included.
        cpu_use: CPU seconds of this process over wall seconds: cores that the host spent.
        traffic: Counts of all layers and timed steps.
        link_busy_s, stall_s: Per step, the time that rows were copied, and that the compute stream waited for
            rows; None on a CPU.
    """

    timing: Timing
    cpu_use: float
    traffic: Traffic
    link_busy_s: float | None
    stall_s: float | None


@torch.no_grad()
def time_steps(
    decoder: DecoderStack,
    context: KVContext,
    lengths: list[int],
    warm_ups: int,
    steps: int,
    tokens: list[int] | None = None,
) -> StepTimes:
    """Run greedy decode steps from contexts of `lengths` tokens on, and time the last `steps` of them.

    The first step takes in `tokens`, one of each sequence, zeros by default.

    The host waits for each step's logits, as sampling does. On CUDA the first two steps
    compile and capture, so they must be among the warm-ups.
    """
    loop = DecodeLoop(decoder, context)
    newest = [0] * len(lengths) if tokens is None else tokens
    length = list(lengths)

    def step() -> None:
        nonlocal newest
        length[:] = [n + 1 for n in length]
        newest = next_tokens(loop.step(newest, length))

    for _ in range(warm_ups):
        step()
    counts, link = _counts(context), context.scheduler.timer.total()
    timing, cpu_use = time_each(step, steps)
    more, link_after = _counts(context), context.scheduler.timer.total()
    busy = stall = None
    if link is not None and link_after is not None:
        busy = (sum(link_after.busy) - sum(link.busy)) / 1e9 / steps
        stall = (sum(link_after.stall) - sum(link.stall)) / 1e9 / steps
    traffic = Traffic(*(after - before for before, after in zip(counts, more, strict=True)))
    return StepTimes(timing, cpu_use, traffic, busy, stall)


def _counts(context: KVContext) -> tuple[int, ...]:
    return dataclasses.astuple(Traffic.total(context.scheduler.traffic()))


def next_tokens(logits: Tensor) -> list[int]:
    """The likeliest token of each row of `[B, vocab]`; waits for the device."""
    return logits.argmax(-1).tolist()


def time_each(step: Callable[[], None], steps: int) -> tuple[Timing, float]:
    """The timing of `steps` calls, and CPU seconds of this process over wall seconds."""
    samples = []
    cpu, began = time.process_time(), time.perf_counter()
    for _ in range(steps):
        started = time.perf_counter()
        step()
        samples.append(time.perf_counter() - started)
    return Timing.of(samples), (time.process_time() - cpu) / (time.perf_counter() - began)
