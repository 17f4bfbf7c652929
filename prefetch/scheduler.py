"""Prefetch: layer l+1's tokens are chosen and fetched while layer l computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ds_offload.kernels.arriving import Arriving
from ds_offload.kernels.slot_attention_launch import StoredRows
from ds_offload.memory.hot_set import HotSet
from ds_offload.memory.kv_store import KVStore
from ds_offload.memory.window import AttentionWindow
from ds_offload.memory.window_buffer import WindowBuffer
from ds_offload.prefetch.link_timer import LinkTimer
from ds_offload.prefetch.selection import LOOK_AHEAD_PART, Selection, Selector, Step
from ds_offload.prefetch.streams import Streams
from ds_offload.prefetch.traffic import Traffic

PrefetchMode = Literal["exact", "speculative", "off"]


@dataclass(frozen=True)
class Kept:
    """What a query attends to: places in `rows`, in order, first the window's, then the selected ones.

    Attributes:
        rows: `[B, Hkv, C, 2, D]`, K and V side by side; or a layer of the store on the device.
        places: `[B, Hkv, P]` int64 into `rows`, -1 for padding; tokens ascend within
            the window (sinks, then recent, the current one last) and within the rest.
            Where rows are quantised, those of the window are into the window's own rows.
        selected_by: The query `[B, H, D]` that selected: the layer's own, or a predicted one.
        arriving: Rows that attention fetches itself; None where all are there.
    """

    rows: Tensor | StoredRows
    places: Tensor
    selected_by: Tensor
    arriving: Arriving | None = None


class PrefetchScheduler:
    """Gives every layer the rows its query attends to.

    Modes:

    - "exact": the query selects and what is missing is fetched in line; behind that, the
      look-ahead brings the tokens that ranked next, for the next step, while everything
      else computes. Most of what a step newly selects ranked just too low a step before.
    - "speculative": a query predicted one layer ahead selects and fetches for layer l+1
      while layer l computes, and attention takes that selection, as in the paper. The
      first layer has no layer before it and is done in line.
    - "off": everything in line.

    Rows in line are fetched by the launch that attends to them (`Kept.arriving`). Exact and
    off attend to the same tokens. Layers read and fill rows of their own, so the prefetch
    stream fills one layer's while another attends over its own. With the store on the
    device there is nothing to fetch: attention reads the store.

    Hand-overs (see `Streams`): `start` runs on the prefetch stream behind `hidden` and
    records `selection` and `gather`, for which `keep` waits. The look-ahead runs there
    behind `admitted`; it takes no slot of what was just selected, and the next step waits
    for it. Labels and store rows of earlier tokens are there since the step began. Places
    are written alternately into two buffers: the prefetch stream fills one behind the
    input of layer l+1, when attention in layer l, the other's last reader, has been issued
    before that input.

    Args:
        hot_set: The device rows of offloaded layers; None reads `store` directly (it
            is on the device then).
        window_buffer: Where the window's rows stand; None where they are read in the store.
    """

    def __init__(
        self,
        mode: PrefetchMode,
        *,
        selector: Selector,
        store: KVStore,
        hot_set: HotSet | None,
        window: AttentionWindow,
        window_buffer: WindowBuffer | None,
        streams: Streams,
        layers: int,
        sequences: int,
        kv_heads: int,
        device: torch.device,
    ) -> None:
        self.selector = selector
        self.timer = LinkTimer(layers, device)
        self._mode = mode
        self._store = store
        self._hot_set = hot_set
        self._window = window
        self._window_buffer = window_buffer
        self._streams = streams
        self._heads = (sequences, kv_heads)
        self._counts = torch.zeros(layers, *self._heads, 4, dtype=torch.int64, device=device)
        self._compared: set[int] = set()
        self._started: dict[int, tuple[Tensor, Tensor]] = {}
        self._step: Step | None = None
        self._places: tuple[Tensor, Tensor] | None = None

    def begin(self, step: Step) -> None:
        """A new step: its lengths and budgets hold for every layer."""
        self.timer.add_step()
        self._step = step
        self._started.clear()
        forced = self._window.forced_slots
        window = torch.cat((self._window.sink_tokens(step.lengths), self._window.recent_tokens(step.lengths)), -1)
        if self._window_buffer is not None:
            window = self._window_buffer.places(window)
        if self._hot_set is not None:
            self._hot_set.begin_step()
        shape = (*self._heads, forced + step.most_kept)
        buffers = torch.empty(2, *shape, dtype=torch.int64, device=window.device)
        self._places = buffers[0], buffers[1]
        for places in self._places:
            places[..., :forced] = window[:, None]

    def wants_prediction(self, layer: int) -> bool:
        """Whether `start` is to be called for `layer`."""
        selects = self._current_step().most_kept > 0 and not self.selector.everything
        return self._mode == "speculative" and layer in self._store and selects

    def start(self, layer: int, hidden: Tensor, predict: Callable[[Tensor], Tensor]) -> None:
        """Choose and fetch for `layer` while the layer before computes.

        Args:
            hidden: Input of the layer before, made as the hand-over `hidden` of that layer.
            predict: Makes the predicted query `[B, H, D]` of it, on the current stream.
        """
        step, streams = self._current_step(), self._streams
        streams.lend(hidden, "prefetch")
        with streams.on("prefetch"):
            streams.wait("hidden", layer - 1)
            with streams.producing("selection", layer):
                query = predict(hidden)
                tokens = self.selector.predict(layer, query, step)
            if self._hot_set is not None:
                with streams.producing("gather", layer):
                    self._hot_set.admit(
                        layer,
                        tokens,
                        places=self._selected_places(layer),
                        counts=self._counts[layer],
                        timer=self.timer.prefetch(layer),
                    )
        self._started[layer] = streams.lend(tokens, "compute"), query

    def keep(self, layer: int, query: Tensor) -> Kept:
        """The rows that `layer`'s query `[B, H, D]` attends to."""
        assert self._places is not None, "begin() comes before a step's layers"
        started, selected_by, arriving = self._started.pop(layer, None), query, None
        if started is not None:
            predicted, selected_by = started
            self.timer.ready(layer)
            self._streams.wait("selection", layer)
            self._streams.wait("gather", layer)
            if self._hot_set is None:
                self._selected_places(layer).copy_(predicted)
        else:
            arriving = self._select(layer, query)
        rows = self._hot_set.rows(layer) if self._hot_set is not None else self._store.stored_rows(layer)
        return Kept(rows, self._places[layer % 2], selected_by, arriving)

    def _select(self, layer: int, query: Tensor) -> Arriving | None:
        """Select in line, and give back what attention is to fetch; in exact mode look ahead behind that."""
        arriving: Arriving | None = None
        step, hot_set = self._current_step(), self._hot_set
        with self._streams.producing("admitted", layer):
            selection = self.selector.select(layer, query, step)
            places = self._selected_places(layer)
            if hot_set is None:
                places.copy_(selection.tokens)
            elif selection.tokens.shape[2]:
                counts, timer = self._counts[layer], self.timer.in_line(layer)
                arriving = hot_set.admit_arriving(layer, selection.tokens, places=places, counts=counts, timer=timer)
                if hot_set.reuse:
                    self._compared.add(layer)
        if hot_set is None or self._mode != "exact" or not hot_set.reuse or selection.scores is None:
            return arriving
        width = min(hot_set.capacity, step.most_kept + step.most_kept // LOOK_AHEAD_PART)
        if width > step.most_kept:
            self._look_ahead(layer, selection, width)
        return arriving

    def _look_ahead(self, layer: int, selection: Selection, width: int) -> None:
        step, hot_set, streams = self._current_step(), self._hot_set, self._streams
        assert hot_set is not None and selection.scores is not None
        for tensor in (selection.scores, selection.keep):
            streams.lend(tensor, "prefetch")
        with streams.on("prefetch"):
            streams.wait("admitted", layer)
            with streams.producing("look_ahead", layer):
                tokens = self.selector.look_ahead(layer, selection, step, width)
                counts, timer = self._counts[layer], self.timer.prefetch(layer)
                hot_set.admit(layer, tokens, counts=counts, attended=False, timer=timer)

    def traffic(self) -> list[Traffic]:
        """Counts of every layer so far; waits for the device."""
        layers = []
        for layer, (moved, selected, old, recalled) in enumerate(self._counts.sum((1, 2)).tolist()):
            compared = (selected, recalled) if layer in self._compared else (0, 0)
            layers.append(Traffic(moved, selected, old, *compared))
        return layers

    def clear_traffic(self) -> None:
        """Forget counts and times so far, on a stream behind all steps."""
        self._counts.zero_()
        self.timer.clear()

    def _current_step(self) -> Step:
        assert self._step is not None, "begin() comes before a step's layers"
        return self._step

    def _selected_places(self, layer: int) -> Tensor:
        """Where the places of the layer's selected tokens stand, behind the window's."""
        assert self._places is not None, "begin() comes before a step's layers"
        return self._places[layer % 2][..., self._window.forced_slots :]
