"""Offloading as Double Sparsity describes it: every selected row is fetched at every step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ds_offload.kv_context import KVContext
from ds_offload.prefetch.link_timer import LinkTimer
from ds_offload.prefetch.scheduler import Kept
from ds_offload.prefetch.selection import Selection, Step
from ds_offload.prefetch.traffic import Traffic


class TopKSelector:
    """The highest label scores by `torch.topk`, its indices in no order (`sorted=False`).

    Args:
        context: Whose labels are scored, and whose window needs no selection.
        scaling: Factor of the attention scores.
    """

    everything = False

    def __init__(self, context: KVContext, scaling: float) -> None:
        self._labels = context.labels
        self._sinks = context.window.sinks
        self._scaling = scaling

    def select(self, layer: int, query: Tensor, step: Step) -> Selection:
        """The selection of queries `[B, H, D]`, -1 where there are fewer candidates."""
        scores = self._labels.scores(layer, query, step.positions, step.max_length, self._scaling)
        token = torch.arange(scores.shape[-1], device=scores.device)
        outside = (token < self._sinks) | (token >= step.past[:, None, None])
        best = scores.masked_fill(outside, -torch.inf).topk(step.most_kept, -1, sorted=False)
        tokens = torch.where(best.values > -torch.inf, best.indices, -1)
        return Selection(tokens, scores, step.keep)


class PaperScheduler:
    """Fetches every selected row in line at every step, in the place of a context's own scheduler.

    Selection, then one gather of the selected rows into the layer's slots, then
    attention over them and the window (Double Sparsity, arXiv 2408.07092, without its
    prefetch): nothing is kept from step to step, and nothing is ordered.

    Args:
        context: Its store is on the host, and its hot set has a slot for every selected
            token at least.
        layers: L.
        scaling: Factor of the attention scores.

    Attributes:
        selector: What selects; may be replaced.
        timer: Times of the copies.
    """

    def __init__(self, context: KVContext, *, layers: int, scaling: float) -> None:
        device = context.store.device
        self.selector = TopKSelector(context, scaling)
        self.timer = LinkTimer(layers, device)
        self._context = context
        self._fetched = torch.zeros(layers, dtype=torch.int64, device=device)
        self._step: Step | None = None
        self._window: Tensor | None = None

    def begin(self, step: Step) -> None:
        """A new step."""
        assert self._context.hot_set is not None, "the store is on the host"
        self._context.hot_set.make()
        self.timer.add_step()
        self._step = step
        window = self._context.window
        tokens = torch.cat((window.sink_tokens(step.lengths), window.recent_tokens(step.lengths)), -1)
        self._window = self._context.hot_set.window.places(tokens)[:, None]

    def wants_prediction(self, layer: int) -> bool:
        """Never: everything is done in line."""
        return False

    def start(self, layer: int, hidden: Tensor, predict: Callable[[Tensor], Tensor]) -> None:
        """Never called; see `wants_prediction`."""
        raise AssertionError("nothing is predicted")

    def keep(self, layer: int, query: Tensor) -> Kept:
        """The rows that `layer`'s query `[B, H, D]` attends to, the selected ones fetched now."""
        context = self._context
        assert self._step is not None and self._window is not None, "begin() comes before a step's layers"
        assert context.hot_set is not None, "the store is on the host"
        tokens = self.selector.select(layer, query, self._step).tokens
        places = context.hot_set.first_place + torch.arange(tokens.shape[2], device=tokens.device)
        places = torch.where(tokens >= 0, places, -1)
        rows = context.hot_set.rows(layer)
        context.store.gather(layer, tokens, places, rows, timer=self.timer.in_line(layer))
        self._fetched[layer] += (tokens >= 0).sum()
        return Kept(rows, torch.cat((self._window.expand(*tokens.shape[:2], -1), places), -1), query)

    def traffic(self) -> list[Traffic]:
        """Counts of every layer so far; waits for the device."""
        return [Traffic(moved=n, selected=n, old=0, predicted=0, recalled=0) for n in self._fetched.tolist()]
