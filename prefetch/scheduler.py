"""Double-buffered prefetch: layer l+1's tokens are chosen and fetched while layer l computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from ds_offload.memory.hot_set import Admission, HotSet
from ds_offload.memory.kv_store import KVStore
from ds_offload.memory.window import AttentionWindow
from ds_offload.prefetch.selection import Selector, Step
from ds_offload.prefetch.streams import Streams
from torch import Tensor

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


class PrefetchScheduler:
    """Gives every layer the rows its query attends to.

    The rows of a step stand in one of two buffers `[B, Hkv, P, 2, D]`, by the layer's
    parity: first the window (sinks, then the ring, ascending), then the selected
    tokens, ascending.

    Modes: "exact" fetches what the predicted query selects while the layer before
    computes, then selects with the true query and fetches what is still missing;
    "speculative" attends to what the predicted query selected; "off" does everything
    in line. Exact and off attend to the same tokens. The first layer has no layer
    before it and is always done in line.

    Hand-overs (see `Streams`): `start` runs on the prefetch stream behind `query`,
    `label_append` and `host_write`, and records `selection` and `gather`; `rows` waits
    for both. A buffer that the prefetch stream fills is waited for by `release`, which
    `release()` records behind the attention that read it.

    Args:
        hot_set: The device rows of offloaded layers; None reads `store` directly (it
            is on the device then).
        buffer_tokens: Largest P.
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
        buffer_tokens: int,
        device: torch.device,
    ) -> None:
        self._mode = mode
        self._selector = selector
        self._store = store
        self._hot_set = hot_set
        self._window = window
        self._streams = streams
        self._heads = (sequences, kv_heads)
        self._row = (2, head_dim)
        size = sequences * kv_heads * buffer_tokens * 2 * head_dim
        self._buffers = [torch.zeros(size, dtype=store.dtype, device=device) for _ in range(2)]
        self._counts = torch.zeros(layers, 5, dtype=torch.int64, device=device)
        self._started: dict[int, tuple[Tensor, Admission | None]] = {}
        self._step: Step | None = None

    def begin(self, step: Step) -> None:
        """A new step: its lengths and budgets hold for every layer."""
        self._step = step
        self._started.clear()
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
        with streams.on("prefetch"):
            streams.wait("query", layer)
            streams.wait("label_append", layer)
            with streams.producing("selection", layer):
                tokens = self._selector.select(layer, query, step)
            streams.wait("host_write", layer)
            if self._mode == "speculative":
                streams.wait("release", layer % 2)
            with streams.producing("gather", layer):
                admission = self._hot_set.admit(layer, tokens) if self._hot_set is not None else None
                if self._mode == "speculative":
                    self._pack_selected(layer, tokens, admission, step)
        streams.lend(tokens, "compute")
        if admission is not None:
            for tensor in (admission.slots, admission.moved, admission.old):
                streams.lend(tensor, "compute")
        self._started[layer] = (tokens, admission)

    def rows(self, layer: int, query: Tensor) -> tuple[Tensor, Tensor]:
        """Rows `[B, Hkv, P, 2, D]` to attend to and which are valid, `[B, Hkv, P]` bool, for `query` `[B, H, D]`."""
        step, streams = self._current_step(), self._streams
        started = self._started.pop(layer, None)
        streams.wait("host_write", layer)
        if started is not None:
            streams.wait("selection", layer)
            streams.wait("gather", layer)
            if started[1] is not None:
                self._counts[layer, 0] += started[1].moved
        if started is not None and self._mode == "speculative":
            tokens, admission = started
        else:
            streams.wait("label_append", layer)
            tokens = self._selector.select(layer, query, step)
            admission = self._hot_set.admit(layer, tokens) if self._hot_set is not None else None
            if admission is not None:
                self._counts[layer, 0] += admission.moved
            self._pack_selected(layer, tokens, admission, step)
            if started is not None:
                self._count_recall(layer, started[0], tokens)
        self._counts[layer, 1] += (tokens >= 0).sum()
        if admission is not None:
            self._counts[layer, 2] += admission.old
        window_valid = self._pack_window(layer, step)
        valid = torch.cat((window_valid[:, None].expand(*self._heads, -1), tokens >= 0), -1)
        return self._buffer(layer, step), valid

    def release(self, layer: int) -> None:
        """The attention over `layer`'s rows has been given to the compute stream."""
        with self._streams.producing("release", layer % 2):
            pass

    def traffic(self) -> Traffic:
        """Counts so far; waits for the device."""
        return Traffic(*self._counts.sum(0).tolist())

    def _current_step(self) -> Step:
        assert self._step is not None, "begin() comes before a step's layers"
        return self._step

    def _buffer(self, layer: int, step: Step) -> Tensor:
        count = self._window.forced_slots + step.most_kept
        sequences, kv_heads = self._heads
        size = sequences * kv_heads * count * self._row[0] * self._row[1]
        return self._buffers[layer % 2][:size].view(*self._heads, count, *self._row)

    def _pack_selected(self, layer: int, tokens: Tensor, admission: Admission | None, step: Step) -> None:
        if step.most_kept == 0:
            return
        buffer = self._buffer(layer, step)
        first = self._window.forced_slots
        if admission is not None and self._hot_set is not None:
            self._hot_set.pack(layer, admission.slots, buffer[:, :, first:])
        else:
            self._read_store(layer, tokens, buffer, first, step)

    def _pack_window(self, layer: int, step: Step) -> Tensor:
        """Fill the window's part of the buffer; which of its tokens exist, `[B, sinks + ring]` bool."""
        buffer = self._buffer(layer, step)
        sinks = self._window.sink_tokens(step.lengths)
        recent = self._window.recent_tokens(step.lengths)
        tokens = torch.cat((sinks, recent), -1)
        heads_tokens = tokens[:, None].expand(*self._heads, -1)
        if self._hot_set is not None:
            slots = self._hot_set.window_slots(heads_tokens)
            self._hot_set.pack(layer, slots, buffer[:, :, : self._window.forced_slots])
        else:
            self._read_store(layer, heads_tokens, buffer, 0, step)
        return tokens >= 0

    def _read_store(self, layer: int, tokens: Tensor, buffer: Tensor, first: int, step: Step) -> None:
        # Padding reads the current token: its row is finite, and masked anyway.
        tokens = torch.where(tokens >= 0, tokens, step.positions[:, None, None])
        slots = (first + torch.arange(tokens.shape[-1], device=tokens.device)).expand_as(tokens)
        self._store.gather(layer, tokens, slots, buffer)

    def _count_recall(self, layer: int, predicted: Tensor, tokens: Tensor) -> None:
        beyond = torch.iinfo(torch.int64).max
        known = predicted.masked_fill(predicted < 0, beyond)
        place = torch.searchsorted(known, tokens).clamp(max=known.shape[-1] - 1)
        hits = (known.gather(-1, place) == tokens) & (tokens >= 0)
        self._counts[layer, 3] += (tokens >= 0).sum()
        self._counts[layer, 4] += hits.sum()
