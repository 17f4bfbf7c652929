"""A text's end decoded step by step with the text's own tokens, as the runtime decodes an answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ds_offload.config import OffloadConfig
from ds_offload.decode import DecodeLoop
from ds_offload.evaluation.subject import EvalSubject, is_open, kept_tokens
from ds_offload.kv_context import KVContext
from ds_offload.memory.plan import MemoryPlan
from ds_offload.memory_check import check_request, settle_config
from ds_offload.planning.request import weight_bytes
from ds_offload.prefetch.selection import Step
from ds_offload.prefill import ProgressCallback, prefill
from ds_offload.statistics import RunStatistics

Visit = Callable[[int, Tensor], None]
Watch = Callable[[KVContext, Step, list[int]], None]


@dataclass(frozen=True)
class ForcedFigures:
    """What the decode steps of one context took.

    Attributes:
        density: Share of the context attended to, mean over layers, KV heads and steps.
        h2d_bytes_per_token: Row bytes moved to the device per step.
        stats: All of `RunStatistics`.
    """

    density: float
    h2d_bytes_per_token: int
    stats: dict[str, Any]


@torch.no_grad()
def teacher_force(
    subject: EvalSubject,
    config: OffloadConfig,
    ids: list[int],
    steps: int,
    visit: Visit,
    on_progress: ProgressCallback | None = None,
    watch: Watch | None = None,
) -> ForcedFigures:
    """Prefill all but the last `steps` tokens of `ids` densely, then decode those one by one.

    Args:
        config: Resolved.
        ids: Token ids of one context, more than `steps`.
        visit: Called with the number of a step and its logits `[vocab]` float32 of the token
            behind `ids[len(ids) - steps + number]`; they are valid during the call.
        watch: Called behind each step with the context, the step, and its length in a list.

    Raises:
        MemoryPlanError: The context does not fit.
    """
    start, decoder = len(ids) - steps, subject.sparse.decoder
    if start < 1 or steps < 1:
        raise ValueError(f"{steps} steps of {len(ids)} tokens; there must be at least one of both and one more token")
    config, plan = _settled(subject, config, start, len(ids))
    statistics = RunStatistics(decoder, config)
    statistics.begin(plan)
    with KVContext(decoder, config, subject.calibration, [len(ids)]) as context:
        streamed = plan.prefill_mode == "streamed"
        prefill(decoder, context, 0, ids[:start], on_progress, streamed=streamed)
        statistics.prefilled()
        loop = DecodeLoop(decoder, context)
        for number, token in enumerate(ids[start:]):
            length = start + number + 1
            visit(number, loop.step([token], [length])[0])
            statistics.stepped(context, [length])
            if watch is not None:
                assert loop.last is not None
                watch(context, loop.last, [length])
            if on_progress is not None:
                on_progress("decode", number + 1, steps)
        statistics.finish(context, loop.capture_s)
        lengths = range(start + 1, len(ids) + 1)
        density = _density(config, context, lengths, decoder.layers, decoder.kv_heads)
    stats = statistics.summary()
    return ForcedFigures(density, stats["h2d_bytes_per_token"], stats)


def _settled(
    subject: EvalSubject, config: OffloadConfig, prompt: int, capacity: int
) -> tuple[OffloadConfig, MemoryPlan]:
    """The config with its K/V dtype and hot set chosen, and the plan, refused where it does not fit."""
    loaded = subject.sparse.loaded
    if is_open(config):
        weights = weight_bytes(loaded.source)
        config = settle_config(loaded.source, config, loaded.device, [prompt], [capacity], loaded=weights)
    return config, check_request(loaded, config, [prompt], [capacity])


def _density(config: OffloadConfig, context: KVContext, lengths: range, layers: int, kv_heads: int) -> float:
    """Share of the context attended to; counted where there is a hot set, else what the budget allows."""
    total = sum(lengths)
    allowed = sum(kept_tokens(config, length) for length in lengths) / total
    if context.hot_set is None:
        return (len(config.dense_layers) + allowed * (layers - len(config.dense_layers))) / layers
    forced = sum(context.window.forced(length) for length in lengths)
    shares = [
        1.0 if layer in config.dense_layers else (forced + traffic.selected / kv_heads) / total
        for layer, traffic in enumerate(context.scheduler.traffic())
    ]
    return sum(shares) / layers
