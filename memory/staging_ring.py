"""Two small buffers through which bytes pass between pageable host memory and the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from ds_offload.errors import MemoryPlanError
from ds_offload.memory.pinned_pool import PinnedPool

# Bytes of both buffers together: the most that the driver page-locks of these, for it has refused before.
RING_BYTES = (32 << 20, 8 << 20, 2 << 20)

Pair = tuple[Tensor, Tensor]


class StagingRing:
    """Copies between contiguous tensors of pageable host memory and of the device, two buffers in turn.

    The CPU fills or empties one buffer while the device copies the other. Copies run on the
    current stream, and the host waits for them where it must. Where not even the ring is
    page-locked the buffers are pageable: the same copies then wait for one another.

    Hand-overs: a buffer is used again behind the event of its last copy, whatever stream
    that was on; the ring looks after it. One thread calls it.

    Args:
        device: The device that computes; on a CPU the same code runs in order.
        sizes: Bytes of the ring to try, the largest first.

    Attributes:
        buffer_bytes: Bytes of one buffer.
    """

    def __init__(self, device: torch.device, sizes: Sequence[int] = RING_BYTES) -> None:
        self._device = device
        self._pool = PinnedPool(device)
        memory = self._allocate(sizes)
        self.buffer_bytes = memory.numel() // 2
        self._buffers = memory.split(self.buffer_bytes)
        self._events: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0

    @property
    def pinned_bytes(self) -> int:
        """Page-locked bytes of the buffers."""
        return self._pool.pinned_bytes

    def close(self) -> None:
        """Wait for the device, and give the buffers back; nothing may pass through them any more."""
        self._pool.close()

    def to_host(self, pairs: Iterable[Pair]) -> None:
        """Copy each (device tensor, host tensor) to the host; all of it is there on return."""
        filled: Callable[[], None] | None = None
        for batch in self._batches(pairs):
            turn = self._next()
            parts = [(self._buffers[turn][first : first + len(to)], to) for first, _, to in batch]
            for (part, _), (_, of, _) in zip(parts, batch, strict=True):
                part.copy_(of, non_blocking=True)
            self._used(turn)
            if filled is not None:
                filled()
            filled = self._emptying(turn, parts)
        if filled is not None:
            filled()

    def to_device(self, pairs: Iterable[Pair]) -> None:
        """Copy each (host tensor, device tensor) to the device, in the order of the current stream.

        What writes the host tensors lies on the current stream, or is done.
        """
        self.wait_for_stream()
        for batch in self._batches(pairs):
            turn = self._next()
            for first, of, to in batch:
                part = self._buffers[turn][first : first + len(of)]
                part.copy_(of)
                to.copy_(part, non_blocking=True)
            self._used(turn)

    def fill(self, rows: int, row_bytes: int, make: Callable[[int, Tensor], None]) -> Iterator[tuple[int, Tensor]]:
        """Rows made by the CPU, on the device: (first row, uint8 `[n, row_bytes]`) until all `rows` have come.

        Args:
            make: Called with the first row and uint8 `[n, row_bytes]` of the host to fill.

        Raises:
            ValueError: A row is larger than a buffer.
        """
        step = self.buffer_bytes // row_bytes
        if not step:
            raise ValueError(f"a row of {row_bytes} bytes does not fit a staging buffer of {self.buffer_bytes}")
        for first in range(0, rows, step):
            turn = self._next()
            count = min(step, rows - first)
            part = self._buffers[turn][: count * row_bytes].view(count, row_bytes)
            make(first, part)
            yield first, part.to(self._device, non_blocking=True)
            self._used(turn)

    def wait_for_stream(self) -> None:
        """Wait until the device has done what the current stream was given."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def _allocate(self, sizes: Sequence[int]) -> Tensor:
        for nbytes in sizes:
            try:
                return self._pool.allocate(nbytes)
            except MemoryPlanError:
                continue
        return torch.empty(sizes[-1], dtype=torch.uint8)

    def _batches(self, pairs: Iterable[Pair]) -> Iterator[list[tuple[int, Tensor, Tensor]]]:
        """Pairs as bytes, as many as fit a buffer at a time: (first byte in the buffer, source, target)."""
        batch: list[tuple[int, Tensor, Tensor]] = []
        used = 0
        for of, to in pairs:
            source, target = of.view(-1).view(torch.uint8), to.view(-1).view(torch.uint8)
            begin = 0
            while begin < len(source):
                count = min(len(source) - begin, self.buffer_bytes - used)
                batch.append((used, source[begin : begin + count], target[begin : begin + count]))
                begin += count
                used += count
                if used == self.buffer_bytes:
                    yield batch
                    batch, used = [], 0
        if batch:
            yield batch

    def _next(self) -> int:
        """The buffer whose turn it is, when its last copy is done."""
        self._turn = 1 - self._turn
        self._done(self._turn)
        return self._turn

    def _used(self, turn: int) -> None:
        """The current stream has been given the last copy of a buffer."""
        if self._device.type == "cuda":
            event = self._events[turn] or torch.cuda.Event()
            event.record(torch.cuda.current_stream(self._device))
            self._events[turn] = event

    def _done(self, turn: int) -> None:
        event = self._events[turn]
        if event is not None:
            event.synchronize()

    def _emptying(self, turn: int, parts: list[Pair]) -> Callable[[], None]:
        def empty() -> None:
            self._done(turn)
            for part, to in parts:
                to.copy_(part)

        return empty
