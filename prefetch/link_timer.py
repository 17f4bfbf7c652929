"""How long the link was busy, and how long the compute stream waited for it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ds_offload.kernels.device_clock import stamp

_NEVER = 2**62


@dataclass(frozen=True)
class LinkTime:
    """Nanoseconds of every layer, summed over steps.

    Attributes:
        busy: From the first row's copy to the last's, of prefetched rows and of those
            fetched in line.
        stall: Of the compute stream: rows fetched in line, and waiting for the prefetch
            stream. At most so much: attention to heads whose rows are there goes on meanwhile.
    """

    busy: list[int]
    stall: list[int]


class LinkTimer:
    """Times of the rows' copies, taken on the device by the kernels that copy.

    Always on: a step adds two atomic operations to every copying program, one tiny
    kernel to every layer that waits for the prefetch stream, and a few at the next step's
    begin. On a CPU there is no link and nothing is timed.
    """

    def __init__(self, layers: int, device: torch.device) -> None:
        self._spans: Tensor | None = None
        if device.type == "cuda":
            # Prefetched and in line, first and last time; when the compute stream began to wait.
            self._spans = torch.empty(layers, 2, 2, dtype=torch.int64, device=device)
            self._ready = torch.full((layers,), _NEVER, dtype=torch.int64, device=device)
            self._busy = torch.zeros(layers, dtype=torch.int64, device=device)
            self._stall = torch.zeros(layers, dtype=torch.int64, device=device)
            self._reset()

    def prefetch(self, layer: int) -> Tensor | None:
        """Where the copy of prefetched rows leaves its times, for `gather_rows`."""
        return self._spans[layer, 0] if self._spans is not None else None

    def in_line(self, layer: int) -> Tensor | None:
        """The same for rows that the compute stream fetches itself."""
        return self._spans[layer, 1] if self._spans is not None else None

    def ready(self, layer: int) -> None:
        """The current stream is about to wait for the layer's prefetched rows."""
        if self._spans is not None:
            stamp(self._ready[layer])

    def add_step(self) -> None:
        """Add the last step's times up, on a stream behind all its copies."""
        if self._spans is None:
            return
        spent = (self._spans[..., 1] - self._spans[..., 0]).clamp_(min=0)
        waited = (self._spans[:, 0, 1] - self._ready).clamp_(min=0)
        self._busy += spent.sum(1)
        self._stall += spent[:, 1] + waited
        self._reset()

    def clear(self) -> None:
        """Forget the times so far, on a stream behind all copies."""
        if self._spans is not None:
            self._busy.zero_()
            self._stall.zero_()
            self._reset()

    def total(self) -> LinkTime | None:
        """The times so far, None on a CPU; waits for the device."""
        if self._spans is None:
            return None
        torch.cuda.synchronize(self._spans.device)
        self.add_step()
        return LinkTime(self._busy.tolist(), self._stall.tolist())

    def _reset(self) -> None:
        assert self._spans is not None
        self._spans[..., 0] = _NEVER
        self._spans[..., 1] = 0
        self._ready.fill_(_NEVER)
