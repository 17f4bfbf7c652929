"""Prefetch: layer l+1's tokens are chosen and fetched while layer l computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ds_offload.kernels.slot_attention import StoredRows
from ds_offload.memory.hot_set import HotSet
from ds_offload.memory.kv_store import KVStore
from ds_offload.memory.window import AttentionWindow
from ds_offload.prefetch.link_timer import LinkTimer
from ds_offload.prefetch.selection import Selector, Step
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
    """

    rows: Tensor | StoredRows
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
    fetch: attention reads the store.

    Hand-overs (see `Streams`): `start` runs on the prefetch stream behind `hidden` and
    records `selection` and `gather`, for which `keep` waits. Labels and store rows of
    earlier tokens are there since the step began. Places are written alternately into
    two buffers: the prefetch stream fills one behind the input of layer l+1, when
    attention in layer l, the other's last reader, has been issued before that input.

    Args:
        hot_set: The device rows of offloaded layers; None reads `store` directly (it
            is on the device then).
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
        device: torch.device,
    ) -> None:
        self.selector = selector
        self.timer = LinkTimer(layers, device)
        self._mode = mode
        self._store = store
        self._hot_set = hot_set
        self._window = window
        self._streams = streams
        self._heads = (sequences, kv_heads)
        self._counts = torch.zeros(layers, *self._heads, 4, dtype=torch.int64, device=device)
        self._compared: set[int] = set()
        self._started: dict[int, Tensor] = {}
        self._step: Step | None = None
        self._places: tuple[Tensor, Tensor] | None = None

    def begin(self, step: Step) -> None:
        """A new step: its lengths and budgets hold for every layer."""
        self._step = step
        self._started.clear()
        forced = self._window.forced_slots
        window = torch.cat((self._window.sink_tokens(step.lengths), self._window.recent_tokens(step.lengths)), -1)
        if self._hot_set is not None:
            window = self._hot_set.window_places(window)
            self._hot_set.begin_step()
        shape = (*self._heads, forced + step.most_kept)
        self._places = tuple(torch.empty(shape, dtype=torch.int64, device=window.device) for _ in range(2))
        for places in self._places:
            places[..., :forced] = window[:, None]

    def wants_prediction(self, layer: int) -> bool:
        """Whether `start` is worth calling for `layer`."""
        step = self._current_step()
        if layer not in self._store or self._mode == "off" or step.most_kept == 0 or self.selector.everything:
            return False
        return self._mode == "speculative" or self._hot_set is not None

    def start(self, layer: int, hidden: Tensor, predict: Callable[[Tensor], Tensor]) -> None:
        """Choose and fetch for `layer` while the layer before computes.

        Args:
            hidden: Input of the layer before, made as the hand-over `hidden` of that layer.
            predict: Makes the predicted query `[B, H, D]` of it, on the current stream.
        """
        step, streams = self._current_step(), self._streams
        speculative = self._mode == "speculative"
        streams.lend(hidden, "prefetch")
        with streams.on("prefetch"):
            streams.wait("hidden", layer - 1)
            with streams.producing("selection", layer):
                tokens = self.selector.predict(layer, predict(hidden), step)
            if self._hot_set is not None:
                with streams.producing("gather", layer):
                    self._hot_set.admit(
                        layer,
                        tokens,
                        places=self._selected_places(layer) if speculative else None,
                        counts=self._counts[layer],
                        attended=speculative,
                        timer=self.timer.prefetch(layer),
                    )
        self._started[layer] = streams.lend(tokens, "compute")

    def keep(self, layer: int, query: Tensor) -> Kept:
        """The rows that `layer`'s query `[B, H, D]` attends to."""
        streams = self._streams
        predicted = self._started.pop(layer, None)
        speculative = self._mode == "speculative" and predicted is not None
        tokens = predicted if speculative else self.selector.select(layer, query, self._current_step())
        assert tokens is not None
        if predicted is not None:
            self.timer.ready(layer)
            streams.wait("selection", layer)
            streams.wait("gather", layer)
        selected = self._selected_places(layer)
        if self._hot_set is None:
            selected.copy_(tokens)
        elif not speculative and tokens.shape[2]:
            counts, timer = self._counts[layer], self.timer.in_line(layer)
            self._hot_set.admit(layer, tokens, places=selected, counts=counts, timer=timer)
            if predicted is not None:
                self._compared.add(layer)
        assert self._places is not None
        rows = self._hot_set.rows(layer) if self._hot_set is not None else self._store.stored_rows(layer)
        return Kept(rows, self._places[layer % 2])

    def end(self) -> None:
        """Behind the last layer of a step: add its times up."""
        self.timer.add_step()

    def traffic(self) -> list[Traffic]:
        """Counts of every layer so far; waits for the device."""
        layers = []
        for layer, (moved, selected, old, recalled) in enumerate(self._counts.sum((1, 2)).tolist()):
            compared = (selected, recalled) if layer in self._compared else (0, 0)
            layers.append(Traffic(moved, selected, old, *compared))
        return layers

    def _current_step(self) -> Step:
        assert self._step is not None, "begin() comes before a step's layers"
        return self._step

    def _selected_places(self, layer: int) -> Tensor:
        """Where the places of the layer's selected tokens stand, behind the window's."""
        assert self._places is not None, "begin() comes before a step's layers"
        return self._places[layer % 2][..., self._window.forced_slots :]
