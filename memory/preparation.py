"""Blocks of host memory made ready in the background, in the order in which they are wanted."""

from __future__ import annotations

import bisect
import copy
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from ds_offload.memory.host_block import HostBlock, touch

# Enough to touch pages faster than they are locked; the other cores feed the device.
TOUCH_THREADS = max(1, min(8, (os.cpu_count() or 2) // 2))
# Touched by one thread at a time.
TOUCH_BYTES = 16 << 20


class Preparation:
    """Parts of blocks touched by several threads, and page-locked by one behind them.

    The first part of every block goes before the second part of any: where a block holds all
    layers of some tokens, the first layers of all tokens are ready first.

    Hand-over: a part is ready behind both. One thread asks and waits; after a failure, a
    refusal or `stop` nothing more is made ready, and waiting ends.

    Args:
        blocks: Of one layout.
        lock: Page-locks bytes first to last of a block, in the background; False: refused, and nothing more is done.
    """

    def __init__(self, blocks: Sequence[HostBlock], lock: Callable[[HostBlock, int, int], bool]) -> None:
        self._blocks = blocks
        self._ends = blocks[0].layout.ends
        self._lock = lock
        self._ready = 0
        self._stopped = False
        self._failure: BaseException | None = None
        self._changed = threading.Condition()
        spans = list(zip([0, *self._ends], self._ends, strict=False))
        self._parts = [(block, first, last) for first, last in spans for block in blocks]
        self._untouched = [-(-(last - first) // TOUCH_BYTES) for _, first, last in self._parts]
        touches = [
            (number, block.address + start, min(TOUCH_BYTES, last - start))
            for number, (block, first, last) in enumerate(self._parts)
            for start in range(first, last, TOUCH_BYTES)
        ]
        # Threads take from one iterator: next() of a list's is atomic.
        self._touches = iter(touches)
        touching = min(TOUCH_THREADS, len(touches))
        self._threads = ThreadPoolExecutor(touching + 1, thread_name_prefix="pinned-pool")
        for work in (*[self._touch] * touching, self._lock_parts):
            self._threads.submit(self._guarded, work)
        # The threads end with their work.
        self._threads.shutdown(wait=False)

    @property
    def ended(self) -> bool:
        """Whether all is ready, or nothing more will be."""
        return self._stopped

    def is_ready(self, block: int, nbytes: int) -> bool:
        """Whether the first `nbytes` bytes of a block, given by number, are ready, or will never be."""
        return self._stopped or self._ready > self._part(block, nbytes)

    def wait(self, block: int, nbytes: int) -> None:
        """Wait until `is_ready`.

        Raises:
            BaseException: What went wrong in the background.
        """
        part = self._part(block, nbytes)
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._ready > part)
        if self._failure is not None and self._ready <= part:
            # A copy: the frames that it passes through would live on with what is kept here, and tensors with them.
            raise copy.copy(self._failure)

    def stop(self) -> None:
        """Begin no further part; those being made are finished."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def join(self) -> None:
        """Wait for the threads."""
        self._threads.shutdown(wait=True)

    def _part(self, block: int, nbytes: int) -> int:
        return bisect.bisect_left(self._ends, nbytes) * len(self._blocks) + block

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            # Without its traceback, which leads back here.
            self._failure = self._failure or error.with_traceback(None)
            self.stop()

    def _touch(self) -> None:
        for number, address, size in self._touches:
            if self._stopped:
                return
            touch(address, size)
            with self._changed:
                self._untouched[number] -= 1
                self._changed.notify_all()

    def _lock_parts(self) -> None:
        for number, part in enumerate(self._parts):
            if not self._is_touched(number) or not self._lock(*part):
                break
            with self._changed:
                self._ready = number + 1
                self._changed.notify_all()
        self.stop()

    def _is_touched(self, number: int) -> bool:
        """Wait until a part is touched; False where that will not be."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or not self._untouched[number])
        return not self._stopped
