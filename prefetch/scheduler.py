"""Prefetch: layer l+1's tokens are chosen and fetched while layer l computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ds_offload.memory.hot_set import Admission, HotSet
from ds_offload.memory.kv_store import KVStore
from ds_offload.memory.window import AttentionWindow
from ds_offload.prefetch.selection import Selector, Step
from ds_offload.prefetch.streams import Streams

PrefetchMode = Literal["exact", "speculative", "off"]


@dataclass(frozen=True)
class Traffic:
    """What a decode moved and found, summed over layers, heads and steps.

    Attributes:
        moved: Rows copied over the link.
        selected: Rows that were selected and attended (the window's not counted).
        old: Of those, rows on the device since an earlier step.
        predicted: Rows the true query selected where there was a prediction to compare.
        recalled: Of those, rows that the prediction had selected too.
    """

    moved: int
    selected: int
    old: int
    predicted: int
    recalled: int


@dataclass(frozen=True)
class Kept:
    """What a query attends to: places in `rows`, in order, first the window's, then the selected ones.

    Attributes:
        rows: `[B, Hkv, C, 2, D]`, K and V side by side.
        places: `[B, Hkv, P]` int64 into `rows`, -1 for padding; tokens ascend within
            the window (sinks, then recent, the current one last) and within the rest.
    """

    rows: Tensor
    places: Tensor


class PrefetchScheduler:
    """Gives every layer the rows its query attends to.

    Modes: "exact" fetches what the predicted query selects while the layer before
    computes, then selects with the true query and fetches what is still missing;
    "speculative" attends to what the predicted query selected; "off" does everything
    in line. Exact and off attend to the same tokens. The first layer has no layer
    before it and is always done in line.

    Layers read and fill rows of their own, so while layer l attends over its rows the
    prefetch stream fills layer l+1's. With the store on the device there is nothing to
    fetch: each layer's rows are gathered into one buffer when it attends.

    Hand-overs (see `Streams`): `start` runs on the prefetch stream behind `query` and
    records `selection` and `gather`, for which `keep` waits. Labels and store rows of
    earlier tokens are there since the step began.

    Args:
        hot_set: The device rows of offloaded layers; None reads `store` directly (it
            is on the device then).
        most_kept: Most candidates a KV head keeps at a step.
    """

    def __init__(
        self,
        mode: PrefetchMode,
        *,
        selector: Selector,
        store: KVStore,
        hot_set: HotSet | None,
        window: AttentionWindow,
        streams: Streams,
        layers: int,
        sequences: int,
        kv_heads: int,
        head_dim: int,
        most_kept: int,
        device: torch.device,
    ) -> None:
        self._mode = mode
        self._selector = selector
        self._store = store
        self._hot_set = hot_set
        self._window = window
        self._streams = streams
        self._heads = (sequences, kv_heads)
        self._buffer: Tensor | None = None
        if hot_set is None:
            size = window.forced_slots + most_kept
            self._buffer = torch.empty(*self._heads, size, 2, head_dim, dtype=store.dtype, device=device)
        self._counts = torch.zeros(layers, 5, dtype=torch.int64, device=device)
        self._started: dict[int, tuple[Tensor, Admission | None]] = {}
        self._step: Step | None = None
        self._window_tokens: Tensor | None = None

    def begin(self, step: Step) -> None:
        """A new step: its lengths and budgets hold for every layer."""
        self._step = step
        self._started.clear()
        tokens = torch.cat((self._window.sink_tokens(step.lengths), self._window.recent_tokens(step.lengths)), -1)
        self._window_tokens = tokens[:, None].expand(*self._heads, -1)
        if self._hot_set is not None:
            self._hot_set.begin_step()

    def wants_prediction(self, layer: int) -> bool:
        """Whether `start` is worth calling for `layer`."""
        step = self._current_step()
        if layer not in self._store or self._mode == "off" or step.most_kept == 0:
            return False
        return self._mode == "speculative" or self._hot_set is not None

    def start(self, layer: int, predict: Callable[[], Tensor]) -> None:
        """Choose and fetch for `layer` with the query `[B, H, D]` that `predict` makes on the compute stream."""
        step, streams = self._current_step(), self._streams
        with streams.producing("query", layer):
            query = predict()
        streams.lend(query, "prefetch")
        admission = None
        with streams.on("prefetch"):
            streams.wait("query", layer)
            with streams.producing("selection", layer):
                tokens = self._selector.select(layer, query, step)
            if self._hot_set is not None:
                with streams.producing("gather", layer):
                    admission = self._hot_set.admit(layer, tokens)
        streams.lend(tokens, "compute")
        if admission is not None:
            for tensor in (admission.places, admission.moved, admission.old):
                streams.lend(tensor, "compute")
        self._started[layer] = (tokens, admission)

    def keep(self, layer: int, query: Tensor) -> Kept:
        """The rows that `layer`'s query `[B, H, D]` attends to."""
        step, streams = self._current_step(), self._streams
        started = self._started.pop(layer, None)
        if started is not None:
            streams.wait("selection", layer)
            streams.wait("gather", layer)
            if started[1] is not None:
                self._counts[layer, 0] += started[1].moved.sum()
        if started is not None and self._mode == "speculative":
            tokens, admission = started
        else:
            tokens = self._selector.select(layer, query, step)
            admission = None
            if self._hot_set is not None and step.most_kept > 0:
                admission = self._hot_set.admit(layer, tokens)
                self._counts[layer, 0] += admission.moved.sum()
            if started is not None:
                self._count_recall(layer, started[0], tokens)
        self._counts[layer, 1] += (tokens >= 0).sum()
        if admission is not None:
            self._counts[layer, 2] += admission.old.sum()
        return self._place(layer, tokens, admission)

    def traffic(self) -> Traffic:
        """Counts so far; waits for the device."""
        return Traffic(*self._counts.sum(0).tolist())

    def _current_step(self) -> Step:
        assert self._step is not None, "begin() comes before a step's layers"
        return self._step

    def _place(self, layer: int, tokens: Tensor, admission: Admission | None) -> Kept:
        window = self._window_tokens
        assert window is not None, "begin() comes before a step's layers"
        if self._hot_set is not None:
            places = self._hot_set.window_places(window)
            selected = admission.places if admission is not None else tokens
            return Kept(self._hot_set.rows(layer), torch.cat((places, selected), -1))
        assert self._buffer is not None, "without a hot set there is a buffer"
        tokens = torch.cat((window, tokens), -1)
        places = torch.arange(tokens.shape[-1], device=tokens.device).expand_as(tokens)
        # Without a hot set the current token's row comes from the store as well.
        self._streams.wait("host_write", layer)
        self._store.gather(layer, tokens, places, self._buffer)
        return Kept(self._buffer, torch.where(tokens >= 0, places, -1))

    def _count_recall(self, layer: int, predicted: Tensor, tokens: Tensor) -> None:
        beyond = torch.iinfo(torch.int64).max
        known = predicted.masked_fill(predicted < 0, beyond)
        place = torch.searchsorted(known, tokens).clamp(max=known.shape[-1] - 1)
        hits = (known.gather(-1, place) == tokens) & (tokens >= 0)
        self._counts[layer, 3] += (tokens >= 0).sum()
        self._counts[layer, 4] += hits.sum()
