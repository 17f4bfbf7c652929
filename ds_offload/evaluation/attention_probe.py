"""Watches sparse attention and compares it with exact attention over the whole store, at every step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor

from ds_offload.kernels.coded_attention import kept_rows
from ds_offload.kv_context import KVContext
from ds_offload.prefetch.scheduler import Kept
from ds_offload.prefetch.selection import Step


class AttentionProbe:
    """Sums up, per layer, what sparse attention captured of the exact attention of the same queries.

    The exact attention is computed in float32 from all K/V of the store, at the same
    position and with the same query. Everything stays on the device and has fixed shapes,
    so that a captured step holds it, too. It reads the whole cache at each step and is
    meant for measuring.

    Args:
        layers: Decoder layers.
        scaling: Factor of the attention scores.
        device: Where the model is.

    Attributes:
        mass, error: Sums `[L]` float64 over steps, of means over the query heads: the exact attention
            weight of the attended tokens, and |sparse - exact| / |exact| of the output.
        steps: Steps counted per layer, `[L]` int64; 0 for a dense layer.
    """

    def __init__(self, layers: int, scaling: float, device: torch.device) -> None:
        self.mass = torch.zeros(layers, dtype=torch.float64, device=device)
        self.error = torch.zeros_like(self.mass)
        self.steps = torch.zeros(layers, dtype=torch.int64, device=device)
        self._scaling = scaling
        self._rows: Tensor | None = None

    def figures(self) -> dict[str, Any]:
        """Means over the steps: `attention_mass`, `output_error`, and both of every layer, None if it is dense."""
        counts = self.steps.tolist()
        mass, error = (
            [total / count if count else None for total, count in zip(sums.tolist(), counts, strict=True)]
            for sums in (self.mass, self.error)
        )
        return {
            "attention_mass": _mean(mass),
            "output_error": _mean(error),
            "layers": {"attention_mass": mass, "output_error": error},
        }

    @contextmanager
    def watching(self, context: KVContext) -> Iterator[None]:
        """Watch the attention of `context` within the block; both calls are put back behind it."""
        scheduler: Any = context.scheduler
        owner: Any = context
        attend, keep = context.attend, scheduler.keep
        kept: list[Kept] = []

        def watched_keep(layer: int, query: Tensor) -> Kept:
            kept[:] = [keep(layer, query)]
            return kept[0]

        def watched_attend(layer: int, query: Tensor, step: Step) -> Tensor:
            out = attend(layer, query, step)
            if layer in context.store:
                self._compare(context, layer, query, step, kept[0], out)
            return out

        scheduler.keep, owner.attend = watched_keep, watched_attend
        try:
            yield
        finally:
            del scheduler.keep, owner.attend
            self._rows = None

    def _compare(self, context: KVContext, layer: int, query: Tensor, step: Step, kept: Kept, out: Tensor) -> None:
        rows = self._all_rows(context, layer, query, step)
        groups = query.shape[1] // rows.shape[1]
        # [B, Hkv, G, T]
        grouped = query.float().unflatten(1, (-1, groups))
        scores = self._scaling * grouped @ rows[..., 0, :].float().transpose(-1, -2)
        beyond = torch.arange(scores.shape[-1], device=scores.device) >= step.lengths[:, None]
        weights = scores.masked_fill(beyond[:, None, None], -torch.inf).softmax(-1)
        exact = (weights @ rows[..., 1, :].float()).flatten(1, 2)
        captured = self._captured(context, layer, grouped, scores, beyond, kept)
        error = (out.float() - exact).norm(dim=-1) / exact.norm(dim=-1)
        self.mass[layer] += captured.double().mean()
        self.error[layer] += error.double().mean()
        self.steps[layer] += 1

    def _captured(
        self, context: KVContext, layer: int, grouped: Tensor, scores: Tensor, beyond: Tensor, kept: Kept
    ) -> Tensor:
        """Exact attention weight of the attended tokens, `[B, Hkv, G]`.

        A place of the hot set does not say whose token it is, so its key is scored again.
        """
        every = scores.masked_fill(beyond[:, None, None], -torch.inf).logsumexp(-1)
        places, padding = kept.places.clamp(min=0), (kept.places < 0)[:, :, None]
        if context.codec is not None:
            assert context.window_buffer is not None, "quantised rows have their window apart"
            named = context.window_buffer.tensor(layer), kept.rows, context.codec.layer(layer), kept.places
            keys = kept_rows(*named, torch.float32)[0][..., 0, :]
            chosen = self._scaling * grouped @ keys.transpose(-1, -2)
        elif context.hot_set is None:
            chosen = scores.gather(-1, places[:, :, None].expand(-1, -1, grouped.shape[2], -1))
        else:
            rows = cast(Tensor, kept.rows)
            keys = rows[..., 0, :].gather(2, places[..., None].expand(-1, -1, -1, rows.shape[-1]))
            chosen = self._scaling * grouped @ keys.float().transpose(-1, -2)
        return (chosen.masked_fill(padding, -torch.inf).logsumexp(-1) - every).exp()

    def _all_rows(self, context: KVContext, layer: int, query: Tensor, step: Step) -> Tensor:
        """K and V of every token `[B, Hkv, T, 2, D]`, the current one's too; beyond the lengths anything finite."""
        batch, kv_heads = len(query), context.labels.rows.shape[1]
        shape = (batch, kv_heads, step.max_length, 2, query.shape[-1])
        codec, window = context.codec, context.window_buffer
        if self._rows is None or self._rows.shape != shape:
            dtype = context.store.dtype if codec is None else query.dtype
            self._rows = torch.zeros(shape, dtype=dtype, device=query.device)
        every = torch.arange(step.max_length, device=query.device).expand(batch, -1)
        # The store has the current token's row already only where attention reads the window there.
        end = step.lengths if window is None else step.positions
        tokens = torch.where(every < end[:, None], every, -1)[:, None].expand(-1, kv_heads, -1).contiguous()
        slots = every[:, None].expand(-1, kv_heads, -1).contiguous()
        if codec is None:
            context.store.gather(layer, tokens, slots, self._rows)
        else:
            coded = self._rows.new_zeros((*shape[:4], codec.layout.part_bytes), dtype=torch.uint8)
            context.store.gather(layer, tokens, slots, coded)
            for sequence, rows in enumerate(coded):
                codec.decode(layer, rows, self._rows[sequence])
        if window is not None:
            # As they are attended to: quantised rows of the window are not.
            forced = (context.window.sink_tokens(step.lengths), context.window.recent_tokens(step.lengths))
            tokens = torch.cat(forced, -1)
            tokens = torch.where(tokens < 0, step.positions[:, None], tokens)
            each = torch.arange(batch, device=query.device)[:, None]
            self._rows[each, :, tokens] = window.tensor(layer)[each, :, window.places(tokens)]
        return self._rows


def _mean(values: list[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None
