"""Where the rows of the sinks and of the recent window stand on the device."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ds_offload.kernels.new_token import WindowRows
from ds_offload.memory.window import AttentionWindow


class WindowBuffer:
    """The first slots of rows `[B, Hkv, C, 2, D]` of every layer: sinks, then the ring of recent tokens.

    Token t of the window is at slot t if it is a sink, else at sinks + t mod ring. The rows
    are those of a hot set, or tensors of their own where that one's are quantised.

    Hand-overs: a layer's rows are written by prefills and new tokens in the compute
    stream's order, and read there.

    Args:
        rows: By layer; C is at least the window's slots.
    """

    def __init__(self, window: AttentionWindow, rows: dict[int, Tensor]) -> None:
        self._window = window
        self._rows = rows

    def fill(self, layer: int, sequence: int, rows: Tensor, start: int = 0) -> None:
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

    def copy(self) -> dict[int, Tensor]:
        """The window's rows of every layer as they are now, `[B, Hkv, slots, 2, D]` each, for `restore`."""
        slots = self._window.forced_slots
        return {layer: rows[:, :, :slots].clone() for layer, rows in self._rows.items()}

    def restore(self, copy: dict[int, Tensor]) -> None:
        """Take the rows of a `copy`, of this window or of one of the same shape."""
        for layer, rows in copy.items():
            self._rows[layer][:, :, : rows.shape[2]].copy_(rows)

    def parts(self, layer: int, sequence: int) -> Iterator[Tensor]:
        """The window's rows of a sequence where they lie: contiguous `[n, 2, D]`, by KV head."""
        for head in self._rows[layer][sequence]:
            yield head[: self._window.forced_slots]

    def tensor(self, layer: int) -> Tensor:
        """The layer's rows `[B, Hkv, C, 2, D]`; only slots that were filled hold numbers."""
        return self._rows[layer]

    def rows(self, layer: int) -> WindowRows:
        """The same, as the kernel that takes in a new token wants them."""
        return WindowRows(self._rows[layer], self._window.sinks, self._window.ring)

    def places(self, tokens: Tensor) -> Tensor:
        """Slots of window tokens `[B, n]`; -1 stays -1."""
        sinks, ring = self._window.sinks, self._window.ring
        return torch.where(tokens < sinks, tokens, sinks + tokens % ring)
