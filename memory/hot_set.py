"""The rows on the device: sinks, recent window, and the hot set of selected tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import torch
from torch import Tensor

from ds_offload.kernels.admit import admit_tokens
from ds_offload.kernels.admit_state import AdmitResult, AdmitState
from ds_offload.kernels.arriving import Arriving
from ds_offload.memory.kv_store import KVStore
from ds_offload.memory.window import AttentionWindow
from ds_offload.memory.window_buffer import WindowBuffer
from ds_offload.notices import notice

# More than this of a prompt's workspace does not stay with torch's allocator when the slots are made: a process is to
# take no more of the device than the larger of the two.
KEPT_WORKSPACE = 512 << 20


class HotSet:
    """Device rows of every offloaded layer, `[B, Hkv, sinks + ring + C, 2, D]` each, of the store's dtype.

    The first slots are the window's (`WindowBuffer`), unless its rows stand apart; then come
    C slots for selected tokens, the least recently selected one leaving first. Everything
    about slots is decided on the device with fixed shapes (`kernels/admit.py`): no host
    synchronisation.

    Until the first step only the window is there: a prompt's workspace and the slots never
    take memory at the same time. Where some of the memory that was planned for the slots has
    gone to another process meanwhile, there are fewer of them.

    Hand-overs: a layer's `admit` calls must be ordered among themselves and behind the
    store writes of the tokens they may select; `rows` of a layer may be read behind
    the `admit` or window write that filled them, and a slot is written again only by a
    later `admit` or window write of that layer, which the caller orders behind the reader.

    Args:
        store: Where missing rows come from.
        layers: The offloaded layers.
        capacity: C.
        context: Most tokens of any sequence.
        least: The largest K that is ever admitted, at most C: C never becomes less.
        reuse: Whether rows stay from step to step; without it every step fetches all it selects.
        apart: The window's rows where they stand elsewhere; this one has none of them then.
        admissions: The most of a layer between two calls of `begin_step`.

    Attributes:
        capacity: As given; what there is from the first step on.
        reuse: As given.
        window: The window's rows, here or apart.
        first_place: Of the C slots in the rows.
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
        least: int = 1,
        reuse: bool = True,
        apart: WindowBuffer | None = None,
        admissions: int = 1,
    ) -> None:
        self.capacity = capacity
        self.reuse = reuse
        self._store = store
        self.first_place = 0 if apart is not None else window.forced_slots
        self._least = max(1, least)
        self._context = context
        self._shape = (sequences, kv_heads, head_dim)
        self._rows = {n: self._empty(0, device) for n in layers}
        self.window = apart or WindowBuffer(window, self._rows)
        self._state: dict[int, AdmitState] = {}
        self._made = False
        # Stamps of a step's admissions, the same for all layers: on the device, since a captured step advances them.
        self._stamps = torch.arange(1 - admissions, 1, dtype=torch.int32, device=device)
        self._recent = torch.zeros_like(self._stamps[0])
        self._admitted = dict.fromkeys(layers, 0)

    def _empty(self, capacity: int, device: torch.device) -> Tensor:
        """A layer's rows, with so many slots behind the window."""
        sequences, kv_heads, head_dim = self._shape
        shape = (sequences, kv_heads, self.first_place + capacity, 2, head_dim)
        return torch.empty(shape, dtype=self._store.dtype, device=device)

    def make(self) -> None:
        """Have the slots; the first step does it.

        Raises:
            torch.OutOfMemoryError: There is not even room for as many as a step selects.
        """
        if self._made:
            return
        _give_back_workspace(self._recent.device)
        while not self._fits():
            fewer = max(self._least, self.capacity * 3 // 4)
            notice(
                f"less memory is free than before the prompt was read: the hot set has {fewer:,} slots a head "
                f"instead of {self.capacity:,}, and decoding is slower"
            )
            self.capacity = fewer
            self._leave_window()
        self._made = True

    def _leave_window(self) -> None:
        """Let go of everything else: it makes room for fewer slots."""
        self._state.clear()
        for layer, rows in self._rows.items():
            self._rows[layer] = rows[:, :, : self.first_place].clone()

    def _fits(self) -> bool:
        """Make the slots, layer by layer, so that one layer's window is there twice at most; whether there is room."""
        device = self._recent.device
        try:
            for layer, window in self._rows.items():
                rows = self._empty(self.capacity, device)
                rows[:, :, : self.first_place] = window
                self._rows[layer] = rows
            for layer in self._rows:
                self._state[layer] = AdmitState.empty(*self._shape[:2], self.capacity, self._context, device)
        except torch.OutOfMemoryError:
            if self.capacity <= self._least:
                raise
            return False
        return True

    def begin_step(self) -> None:
        """A new token: what the last one's admissions selected counts as recent from here on."""
        self.make()
        self._recent.copy_(self._stamps[0])
        self._stamps.add_(len(self._stamps))
        self._admitted = dict.fromkeys(self._admitted, 0)
        if not self.reuse:
            for state in self._state.values():
                state.clear(self._recent)

    def forget(self) -> None:
        """Empty every slot for selected tokens, behind whatever read them; the window stays."""
        for state in self._state.values():
            state.clear(self._stamps[0])

    def copy_from(self, other: HotSet) -> None:
        """Take over window, slots and stamps of a hot set of the same shape."""
        if other._made:
            self.capacity = other.capacity
            self.make()
        same = self.capacity == other.capacity
        for layer, rows in self._rows.items():
            # Of slots that there is no room for a second time, none is copied.
            shared = other._rows[layer].shape[2] if same else self.first_place
            rows[:, :, :shared].copy_(other._rows[layer][:, :, :shared])
        for layer, state in other._state.items() if same else ():
            for field in fields(AdmitState):
                getattr(self._state[layer], field.name).copy_(getattr(state, field.name))
        self._stamps.copy_(other._stamps)

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
        result = self._admit(layer, tokens, places, counts, attended)
        rows = self._rows[layer]
        self._store.gather(layer, result.missing, result.missing_places, rows, result.moved, timer)
        return result.places

    def admit_arriving(
        self, layer: int, tokens: Tensor, *, places: Tensor, counts: Tensor | None = None, timer: Tensor | None = None
    ) -> Arriving | None:
        """`admit`, but for the rows: attention over `places` fetches them, the next that is done to the layer's rows.

        Returns:
            What it must be given; None where the rows are there.
        """
        return self.arriving(layer, self._admit(layer, tokens, places, counts, True), timer)

    def arriving(self, layer: int, admitted: AdmitResult, timer: Tensor | None) -> Arriving | None:
        """The gather of what is missing, still to be done; None where it is done: of a staged store, by the host."""
        lists = admitted.missing, admitted.missing_places
        if self._store.staged:
            self._store.gather(layer, *lists, self._rows[layer], admitted.moved, timer)
            return None
        stored = self._store.stored_rows(layer)
        return Arriving(stored.table, stored.layer, *lists, admitted.moved, admitted.progress, timer)

    def _admit(
        self, layer: int, tokens: Tensor, places: Tensor | None, counts: Tensor | None, attended: bool
    ) -> AdmitResult:
        number = self._admitted[layer]
        assert number < len(self._stamps), f"layer {layer} has had {number} admissions since its step began"
        self._admitted[layer] += 1
        return admit_tokens(
            self._state[layer],
            tokens,
            self._stamps[number],
            self._recent,
            first_place=self.first_place,
            places=places,
            counts=counts,
            attended=attended,
        )

    def rows(self, layer: int) -> Tensor:
        """The layer's rows `[B, Hkv, C, 2, D]`, the window's in front; only places that were filled hold numbers."""
        return self._rows[layer]


def _give_back_workspace(device: torch.device) -> None:
    """Give the system what torch's allocator has kept of tensors that are gone, where that is much."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        if kept > KEPT_WORKSPACE:
            torch.cuda.empty_cache()
