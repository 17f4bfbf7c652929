"""Host memory that the GPU reads and writes directly: mapped, touched, then registered."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import mmap
import os
import threading
from collections import deque
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ds_offload.errors import MemoryPlanError
from ds_offload.machine.host_memory import memlock_limit
from ds_offload.machine.numa import place_near
from ds_offload.notices import warn

_TOUCH_THREADS = 16
_PAGE = mmap.PAGESIZE
# A huge page is touched by one thread.
_HUGE_PAGE = 2 << 20
# A refused block is registered in halves down to pieces of this size.
_SMALLEST_PIECE = 8 << 20
_CURE = (
    "to have it locked run `ulimit -l unlimited` first, start docker with --ulimit memlock=-1, give WSL more memory "
    "in .wslconfig, free host memory, or shorten the context"
)


@dataclass(eq=False)
class _Block:
    """A mapping, the pieces of it, (address, bytes), that are registered, and how many pools hold it."""

    memory: mmap.mmap
    address: int
    size: int
    pieces: list[tuple[int, int]] = field(default_factory=list)
    holders: int = 1

    @classmethod
    def map(cls, size: int) -> _Block:
        # Private, since shared memory gets no huge pages by default: with them a block is touched and registered
        # several times as fast.
        private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
        memory = mmap.mmap(-1, size, **private)
        # Refused where the system has none. A forked child must not copy what the device may be writing.
        for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):
            with contextlib.suppress(AttributeError, OSError):
                memory.madvise(getattr(mmap, advice))
        return cls(memory, torch.frombuffer(memory, dtype=torch.uint8).data_ptr(), size)


class PinnedPool:
    """Blocks of host memory, page-locked for `device` when it is a CUDA device, plain otherwise.

    Making the pool allocates nothing. Blocks live until `close`, which unregisters
    them on every way out of the `with` statement and gives their pages back to the system;
    tensors over a block must not be used after that. They read zeros then, and the
    addresses are unmapped with the last of them. One thread calls the pool. A block that
    another pool adopted goes with the last of its pools.

    A private mapping of huge pages, touched by several threads and then registered, is ready
    about ten times as fast as `torch.empty(..., pin_memory=True)` (14.6 against 1.5 GB/s on an
    H100 machine with 16 cores; 2.9 with a shared mapping of small pages), and is not rounded up
    to a power of two. A forked child does not have it. On a machine with several NUMA nodes it is placed on the GPU's.

    Args:
        device: The device that computes.
        pageable_cost: What it costs to go on with blocks that the driver refuses to
            page-lock, for the one warning that says so. The first refused block and all
            later ones are left pageable then. None: a refusal is an error.
    """

    def __init__(self, device: torch.device, pageable_cost: str | None = None) -> None:
        self._device = device
        self._pageable_cost = pageable_cost
        # Why no more is registered; said once, by the thread that calls the pool.
        self._refused: str | None = None
        self._warned = False
        self._pin = device.type == "cuda"
        self._blocks: list[_Block] = []
        self._ahead: dict[tuple[int, int | None], deque[Future[_Block]]] = {}
        self._worker: ThreadPoolExecutor | None = None
        # Set for the worker that `close` waits for.
        self._stopping = threading.Event()

    def __enter__(self) -> PinnedPool:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def nbytes(self) -> int:
        """Bytes held now, blocks made ahead among them."""
        return sum(block.size for block in list(self._blocks))

    @property
    def pinned_bytes(self) -> int:
        """Bytes held and page-locked now."""
        return sum(size for block in list(self._blocks) for _, size in list(block.pieces))

    def left_pageable(self, block: Tensor) -> bool:
        """Whether a block of this pool should be page-locked and is not, so that no kernel may read it in place."""
        return self._pin and any(held.address == block.data_ptr() and not held.pieces for held in list(self._blocks))

    def prepare(self, nbytes: int, *, blocks: int = 1, grain: int | None = None) -> None:
        """Start making blocks on a background thread; `allocate` with the same arguments takes them, first come first.

        No CUDA graph may be captured until they are taken: registering memory may spoil
        the capture. What goes wrong is raised by the `allocate` that takes the block.

        Args:
            nbytes, grain: As for `allocate`.
            blocks: How many to add to those being made.

        Raises:
            ValueError: `nbytes` or `grain` below 1.
        """
        key = (_whole_pages(nbytes), _checked_grain(grain))
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, thread_name_prefix="pinned-pool")
        queue = self._ahead.setdefault(key, deque())
        queue.extend(self._worker.submit(self._make, *key, self._stopping) for _ in range(blocks))

    def allocate(self, nbytes: int, *, grain: int | None = None) -> Tensor:
        """A new block `[nbytes]` uint8, zeroed; one that `prepare` made or is making, if there is one of that size.

        Args:
            nbytes: At least 1.
            grain: Where the driver refuses to register the block as a whole, it is
                registered in pieces that end at multiples of `grain` bytes: a copy between
                host and device must not cross one. Kernels that read the block in place
                may. None: copies may be anywhere, and the block is not split.

        Raises:
            ValueError: `nbytes` or `grain` below 1.
            MemoryError: The host has no such block.
            MemoryPlanError: The driver refused to page-lock it, and the pool has no
                `pageable_cost`. The block is gone, the CUDA error is cleared, and what was
                allocated before is untouched.
        """
        key = (_whole_pages(nbytes), _checked_grain(grain))
        queue = self._ahead.get(key)
        block = queue.popleft().result() if queue else self._make(*key, self._stopping)
        if self._refused is not None and not self._warned:
            self._warned = True
            warn(self._refused)
        return torch.frombuffer(block.memory, dtype=torch.uint8, count=nbytes)

    def adopt(self, other: PinnedPool, block: Tensor) -> None:
        """Hold a block that `other` allocated, too: it lives until both pools are closed.

        Raises:
            ValueError: `block` does not begin a block of `other`.
        """
        found = next((held for held in other._blocks if held.address == block.data_ptr()), None)
        if found is None:
            raise ValueError("the tensor does not begin a block of the other pool")
        found.holders += 1
        self._blocks.append(found)

    def close(self) -> None:
        """Join the background thread, wait for the device, then unregister and give back every block."""
        worker, self._worker = self._worker, None
        self._stopping.set()
        try:
            if worker is not None:
                worker.shutdown(wait=True, cancel_futures=True)
        finally:
            self._ahead.clear()
            self._stopping = threading.Event()
            try:
                if self.pinned_bytes:
                    _synchronize(self._device)
            finally:
                while self._blocks:
                    self._release(self._blocks[-1])

    def _make(self, size: int, grain: int | None, stopping: threading.Event) -> _Block:
        try:
            block = _Block.map(size)
        except OSError as error:
            raise MemoryError(f"no {size / 2**20:.0f} MiB of host memory for the KV cache: {error}") from error
        # Listed before it is registered: whatever interrupts what follows, `close` finds it.
        self._blocks.append(block)
        if not self._pin:
            return block
        try:
            place_near(self._device, block.address, size)
            _touch(block.address, size)
            if stopping.is_set():
                raise CancelledError
            if self._refused is None:
                self._register(block, grain)
        except BaseException:
            self._release(block)
            raise
        return block

    def _register(self, block: _Block, grain: int | None) -> None:
        """Page-lock a block as a whole, or in the largest pieces that the driver takes, or not at all."""
        step = block.size if grain is None else math.lcm(grain, _PAGE)
        pending = [(block.address, block.size)]
        while pending:
            address, size = pending.pop()
            block.pieces.append((address, size))
            code = _register(self._device, address, size)
            if code == 0:
                continue
            block.pieces.pop()
            half = size // 2 // step * step
            if half >= _SMALLEST_PIECE:
                pending += [(address + half, size - half), (address, half)]
                continue
            refusal = _refusal(block.size, self.pinned_bytes, code)
            if self._pageable_cost is None:
                raise MemoryPlanError(f"{refusal}; the GPU cannot read it in place then; {_CURE}")
            # A copy must not cross from memory that is registered to memory that is not.
            self._unregister(block)
            self._refused = f"{refusal}; {self._pageable_cost}; {_CURE}"
            return

    def _unregister(self, block: _Block) -> None:
        for address, _ in block.pieces:
            _unregister(self._device, address)
        block.pieces.clear()

    def _release(self, block: _Block) -> None:
        block.holders -= 1
        if block.holders:
            self._blocks.remove(block)
            return
        self._unregister(block)
        # Tensors over the block may outlive this, in the frames of an exception for one: the pages must not.
        with contextlib.suppress(AttributeError, OSError):
            block.memory.madvise(mmap.MADV_DONTNEED)
        with contextlib.suppress(ValueError):
            self._blocks.remove(block)


def _whole_pages(nbytes: int) -> int:
    if nbytes < 1:
        raise ValueError(f"nbytes={nbytes} must be at least 1")
    return -(-nbytes // _PAGE) * _PAGE


def _checked_grain(grain: int | None) -> int | None:
    if grain is not None and grain < 1:
        raise ValueError(f"grain={grain} must be at least 1, or None")
    return grain


def _touch(address: int, size: int) -> None:
    """Fault every page in, several threads at once (memset releases the interpreter lock)."""
    share = -(-size // _TOUCH_THREADS // _HUGE_PAGE) * _HUGE_PAGE
    with ThreadPoolExecutor(_TOUCH_THREADS) as pool:
        for start in range(0, size, share):
            pool.submit(ctypes.memset, address + start, 0, min(share, size - start))


def _register(device: torch.device, address: int, size: int) -> int:
    """Page-lock memory for `device`; returns CUDA's code, 0 when done, cleared otherwise."""
    with torch.cuda.device(device):
        code = int(torch.cuda.cudart().cudaHostRegister(address, size, 0))
        if code:
            _clear_error()
    return code


def _unregister(device: torch.device, address: int) -> None:
    with torch.cuda.device(device):
        if int(torch.cuda.cudart().cudaHostUnregister(address)):
            _clear_error()


def _synchronize(device: torch.device) -> None:
    torch.cuda.synchronize(device)


def _clear_error() -> None:
    """Take a failed call's code off this thread, where the next kernel launch would take it for its own.

    CUDA keeps the code for each thread, so the thread that made the call clears it.
    """
    runtime = _cuda_runtime()
    if runtime is not None:
        runtime.cudaGetLastError()
        return
    # torch asks for the code behind every launch of its own, which clears it.
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device="cuda").add_(1)


@functools.cache
def _cuda_runtime() -> ctypes.CDLL | None:
    """The runtime library that torch has loaded, whose `cudaGetLastError` torch does not pass on; None if not found."""
    version, only_loaded = torch.version.cuda, getattr(os, "RTLD_NOLOAD", None)
    if version is None or only_loaded is None:
        return None
    try:
        return ctypes.CDLL(f"libcudart.so.{version.split('.')[0]}", mode=only_loaded)
    except OSError:
        return None


def _refusal(size: int, held: int, code: int) -> str:
    """What was refused, and why."""
    limit = memlock_limit()
    memlock = "unlimited" if limit is None else f"{limit / 2**10:,.0f} KiB"
    return (
        f"the driver refused to page-lock {size / 2**20:.0f} MiB of host memory after {held / 2**30:.2f} GiB "
        f"({_error_text(code)}; memlock is {memlock})"
    )


def _error_text(code: int) -> str:
    try:
        runtime = torch.cuda.cudart()
        return f"CUDA error {code}: {runtime.cudaGetErrorString(runtime.cudaError(code))}"
    except Exception:
        # The text is a courtesy; without a working runtime there is the number.
        return f"CUDA error {code}"
