"""The rows on the device: sinks, recent window, and the hot set of selected tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import torch
from torch import Tensor

from ds_offload.kernels.admit import admit_tokens
from ds_offload.kernels.admit_state import AdmitState
from ds_offload.kernels.new_token import WindowRows
from ds_offload.memory.kv_store import KVStore
from ds_offload.memory.window import AttentionWindow


class HotSet:
    """Device rows of every offloaded layer, `[B, Hkv, sinks + ring + C, 2, D]` each.

    The first slots are the sinks, then the ring of recent tokens (token t at ring slot
    t mod ring), then C slots for selected tokens, the least recently selected one
    leaving first. Everything about slots is decided on the device with fixed shapes
    (`kernels/admit.py`): no host synchronisation.

    Hand-overs: a layer's `admit` calls must be ordered among themselves and behind the
    store writes of the tokens they may select; `rows` of a layer may be read behind
    the `admit` or window write that filled them, and a slot is written again only by a
    later `admit` or window write of that layer, which the caller orders behind the reader.

    Args:
        store: Where missing rows come from.
        layers: The offloaded layers.
        capacity: C, at least the largest K that is ever admitted.
        context: Most tokens of any sequence.
        reuse: Whether rows stay from step to step; without it every step fetches all it selects.

    Attributes:
        capacity, reuse: As given.
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
        context: int,
        device: torch.device,
        reuse: bool = True,
    ) -> None:
        self.capacity = capacity
        self.reuse = reuse
        self._store = store
        self._window = window
        heads = (sequences, kv_heads)
        shape = (*heads, window.forced_slots + capacity, 2, head_dim)
        self._rows = {n: torch.empty(shape, dtype=store.dtype, device=device) for n in layers}
        self._state = {n: AdmitState.empty(*heads, capacity, context, device) for n in layers}
        # Device counters, one a layer: a captured step advances them, and two streams never share one.
        self._clock = torch.zeros(max(layers, default=0) + 1, dtype=torch.int32, device=device)
        self._began = torch.zeros_like(self._clock)
        self._recent = torch.zeros_like(self._clock)

    def begin_step(self) -> None:
        """A new token: what the last one's admissions selected counts as recent from here on."""
        self._recent.copy_(self._began)
        torch.add(self._clock, 1, out=self._began)
        if not self.reuse:
            for state in self._state.values():
                state.clear()

    def forget(self) -> None:
        """Empty every slot for selected tokens, behind whatever read them; the window stays."""
        for state in self._state.values():
            state.clear()

    def copy_from(self, other: HotSet) -> None:
        """Take over window, slots and stamps of a hot set of the same shape."""
        for layer, rows in self._rows.items():
            rows.copy_(other._rows[layer])
            for field in fields(AdmitState):
                getattr(self._state[layer], field.name).copy_(getattr(other._state[layer], field.name))
        for mine, others in zip(self._stamps, other._stamps, strict=True):
            mine.copy_(others)

    @property
    def _stamps(self) -> tuple[Tensor, Tensor, Tensor]:
        return self._clock, self._began, self._recent

    def fill_window(self, layer: int, sequence: int, rows: Tensor, start: int = 0) -> None:
        """Take sinks and recent window from rows `[Hkv, n, 2, D]` of tokens `start` to `start + n`.

        These are the newest tokens of the sequence; the window of those before is there already.
        """
        length = start + rows.shape[1]
        sinks, ring = self._window.sinks, self._window.ring
        target = self._rows[layer][sequence]
        kept = min(sinks, length)
        if start < kept:
            target[:, start:kept] = rows[:, : kept - start]
        first = max(sinks, length - ring, start)
        if first < length:
            slots = sinks + torch.arange(first, length, device=rows.device) % ring
            target[:, slots] = rows[:, first - start :].to(target.dtype)

    def admit(
        self,
        layer: int,
        tokens: Tensor,
        *,
        places: Tensor | None = None,
        counts: Tensor | None = None,
        attended: bool = True,
        timer: Tensor | None = None,
    ) -> Tensor:
        """Bring `tokens` `[B, Hkv, K]` int64 (distinct, -1 for padding) on the device; runs on the current stream.

        Args:
            places: Where to write the result.
            counts: `[B, Hkv, 4]` int64 to add to; see `admit_tokens`.
            attended: Whether this selection is attended to, or only brings rows.
            timer: `[2]` int64 on CUDA for the time of the copying; see `gather_rows`.

        Returns:
            The tokens' places in the layer's rows, `[B, Hkv, K]` int64, -1 for padding.
        """
        result = admit_tokens(
            self._state[layer],
            tokens,
            self._clock[layer].add_(1),
            self._recent[layer],
            first_place=self._window.forced_slots,
            places=places,
            counts=counts,
            attended=attended,
        )
        rows = self._rows[layer]
        self._store.gather(layer, result.missing, result.missing_places, rows, result.moved, timer)
        return result.places

    def rows(self, layer: int) -> Tensor:
        """The layer's rows `[B, Hkv, sinks + ring + C, 2, D]`; only places that were filled hold numbers."""
        return self._rows[layer]

    def window_rows(self, layer: int) -> WindowRows:
        """The same, as the kernel that takes in a new token wants them."""
        return WindowRows(self._rows[layer], self._window.sinks, self._window.ring)

    def window_places(self, tokens: Tensor) -> Tensor:
        """Places of window tokens `[B, n]` in a layer's rows; -1 stays -1."""
        sinks, ring = self._window.sinks, self._window.ring
        return torch.where(tokens < sinks, tokens, sinks + tokens % ring)
