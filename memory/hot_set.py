"""The rows on the device: sinks, recent window, and the hot set of selected tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from ds_offload.memory.kv_store import KVStore
from ds_offload.memory.window import AttentionWindow
from torch import Tensor

_NEVER = torch.iinfo(torch.int32).max


@dataclass(frozen=True)
class Admission:
    """Where selected tokens stand on the device after `HotSet.admit`.

    Attributes:
        tokens: `[B, Hkv, K]` int64 as selected, -1 for padding.
        slots: `[B, Hkv, K]` int64, 0 for padding.
        moved: Rows copied over the link, int64 scalar on the device.
        old: Rows that an earlier step had left there, int64 scalar on the device.
    """

    tokens: Tensor
    slots: Tensor
    moved: Tensor
    old: Tensor


class HotSet:
    """Device rows of every offloaded layer, `[B, Hkv, sinks + ring + C, 2, D]` each.

    The first slots are the sinks, then the ring of recent tokens (token t at ring slot
    t mod ring), then C slots for selected tokens, the least recently selected one
    leaving first. Everything about slots is decided on the device with fixed shapes:
    no host synchronisation.

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
        self._capacity = capacity
        heads = (sequences, kv_heads)
        # Zeros, not empty: a masked row must not hold a NaN.
        self._rows = {
            n: torch.zeros(*heads, window.forced_slots + capacity, 2, head_dim, dtype=store.dtype, device=device)
            for n in layers
        }
        # One extra column takes the writes of padding and of hits.
        self._token = {n: torch.full((*heads, capacity + 1), -1, dtype=torch.int64, device=device) for n in layers}
        self._stamp = {n: torch.zeros(*heads, capacity + 1, dtype=torch.int32, device=device) for n in layers}
        self._arrived = {n: torch.zeros(*heads, capacity + 1, dtype=torch.int32, device=device) for n in layers}
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
        capacity, offset = self._capacity, self._window.forced_slots
        token, stamp, arrived = self._token[layer], self._stamp[layer], self._arrived[layer]
        clock = self._clock[layer].add_(1)
        wanted = tokens >= 0

        held, by_token = token[..., :capacity].sort(-1)
        place = torch.searchsorted(held, tokens.contiguous()).clamp(max=capacity - 1)
        hit = (held.gather(-1, place) == tokens) & wanted
        hit_slot = by_token.gather(-1, place)
        now = clock.expand(tokens.shape)
        stamp.scatter_(-1, torch.where(hit, hit_slot, capacity), now)

        oldest = stamp[..., :capacity].argsort(dim=-1, stable=True)
        miss = wanted & ~hit
        rank = (miss.cumsum(-1) - 1).clamp(min=0)
        slot = torch.where(hit, hit_slot, oldest.gather(-1, rank))
        new_slot = torch.where(miss, slot, capacity)
        token.scatter_(-1, new_slot, tokens)
        stamp.scatter_(-1, new_slot, now)
        arrived.scatter_(-1, new_slot, now)
        stamp[..., capacity] = _NEVER

        slots = torch.where(wanted, slot + offset, 0)
        self._store.gather(layer, torch.where(miss, tokens, -1), slots, self._rows[layer])
        old = hit & (arrived.gather(-1, torch.where(hit, slot, capacity)) < self._began[layer])
        return Admission(tokens, slots, miss.sum(), old.sum())

    def pack(self, layer: int, slots: Tensor, out: Tensor) -> None:
        """Copy the rows at `slots` `[B, Hkv, K]` to `out` `[B, Hkv, K, 2, D]`, in that order."""
        rows = self._rows[layer]
        sequences, kv_heads, count = slots.shape
        base = torch.arange(sequences * kv_heads, device=slots.device).view(sequences, kv_heads, 1) * rows.shape[2]
        flat = rows.view(-1, rows.shape[-2] * rows.shape[-1])
        out.copy_(flat.index_select(0, (base + slots).view(-1)).view(sequences, kv_heads, count, *rows.shape[-2:]))

    def window_slots(self, tokens: Tensor) -> Tensor:
        """Slots of window tokens `[B, n]`; absent ones (-1) give a slot that holds finite numbers."""
        sinks, ring = self._window.sinks, self._window.ring
        return torch.where(tokens < sinks, tokens.clamp(min=0), sinks + tokens % ring)
