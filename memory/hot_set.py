"""The rows on the device: sinks, recent window, and the hot set of selected tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_offload.kernels.admit import AdmitState, admit_tokens
from ds_offload.memory.kv_store import KVStore
from ds_offload.memory.window import AttentionWindow


@dataclass(frozen=True)
class Admission:
    """Where selected tokens stand on the device after `HotSet.admit`.

    Attributes:
        tokens: `[B, Hkv, K]` int64 as selected, -1 for padding.
        places: Their places in the layer's rows, `[B, Hkv, K]` int64, -1 for padding.
        moved: Rows copied over the link, `[B, Hkv]` int32.
        old: Rows that an earlier step had left there, `[B, Hkv]` int32.
    """

    tokens: Tensor
    places: Tensor
    moved: Tensor
    old: Tensor


class HotSet:
    """Device rows of every offloaded layer, `[B, Hkv, sinks + ring + C, 2, D]` each.

    The first slots are the sinks, then the ring of recent tokens (token t at ring slot
    t mod ring), then C slots for selected tokens, the least recently selected one
    leaving first. Everything about slots is decided on the device with fixed shapes
    (`kernels/admit.py`): no host synchronisation.

    Hand-overs: a layer's `admit` calls must be ordered among themselves and behind the
    store writes of the tokens they may select; `rows` of a layer may be read behind
    the `admit` or `append` that filled them, and a slot is written again only by a
    later `admit` or `append` of that layer, which the caller orders behind the reader.

    Args:
        store: Where missing rows come from.
        layers: The offloaded layers.
        capacity: C, at least the largest K that is ever admitted.
    """

    def __init__(
        self,
        store: KVStore,
        *,
        layers: Sequence[int],
        sequences: int,
        kv_heads: int,
        head_dim: int,
        window: AttentionWindow,
        capacity: int,
        device: torch.device,
    ) -> None:
        self._store = store
        self._window = window
        heads = (sequences, kv_heads)
        shape = (*heads, window.forced_slots + capacity, 2, head_dim)
        self._rows = {n: torch.empty(shape, dtype=store.dtype, device=device) for n in layers}
        self._state = {n: AdmitState.empty(*heads, capacity, device) for n in layers}
        # Device counters, one a layer: a captured step advances them, and two streams never share one.
        self._clock = torch.zeros(max(layers, default=0) + 1, dtype=torch.int32, device=device)
        self._began = torch.zeros_like(self._clock)

    def begin_step(self) -> None:
        """A new token: rows admitted before count as old from here on."""
        torch.add(self._clock, 1, out=self._began)

    def fill_window(self, layer: int, sequence: int, rows: Tensor) -> None:
        """Take sinks and recent window from a prompt's rows `[Hkv, T, 2, D]`."""
        length = rows.shape[1]
        sinks, ring = self._window.sinks, self._window.ring
        target = self._rows[layer][sequence]
        kept = min(sinks, length)
        target[:, :kept] = rows[:, :kept]
        first = max(sinks, length - ring)
        if first < length:
            slots = sinks + torch.arange(first, length, device=rows.device) % ring
            target[:, slots] = rows[:, first:].to(target.dtype)

    def append(self, layer: int, positions: Tensor, rows: Tensor) -> None:
        """Put the current token's rows `[B, Hkv, 2, D]`, at `positions` `[B]`, into their window slots."""
        sinks, ring = self._window.sinks, self._window.ring
        slots = torch.where(positions < sinks, positions, sinks + positions % ring)
        target = self._rows[layer]
        target[torch.arange(len(slots), device=slots.device), :, slots] = rows.to(target.dtype)

    def admit(self, layer: int, tokens: Tensor) -> Admission:
        """Bring `tokens` `[B, Hkv, K]` (distinct, -1 for padding) on the device; runs on the current stream."""
        clock = self._clock[layer].add_(1)
        result = admit_tokens(self._state[layer], tokens, clock, self._began[layer])
        places = result.slots + self._window.forced_slots
        self._store.gather(layer, result.missing, places, self._rows[layer])
        return Admission(tokens, torch.where(tokens >= 0, places, -1), result.moved, result.old)

    def rows(self, layer: int) -> Tensor:
        """The layer's rows `[B, Hkv, sinks + ring + C, 2, D]`; only places that were filled hold numbers."""
        return self._rows[layer]

    def window_places(self, tokens: Tensor) -> Tensor:
        """Places of window tokens `[B, n]` in a layer's rows; -1 stays -1."""
        sinks, ring = self._window.sinks, self._window.ring
        return torch.where(tokens < sinks, tokens, sinks + tokens % ring)
