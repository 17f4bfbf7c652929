"""A block of host memory: mapped or managed, touched, and page-locked part by part."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import math
import mmap
import os
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ds_offload.memory import managed_memory, page_locking

PAGE = mmap.PAGESIZE
# A refused part is locked in halves down to pieces of this size.
SMALLEST_PIECE = 8 << 20
# Bytes that are locked in one call at least: it takes a lock of the driver, for which launches wait.
PART_BYTES = 16 << 20
# Of madvise: fault pages in for writing (Linux 5.14), without writing them a second time as memset does.
_POPULATE_WRITE = 23
# Writing such pages by hand would end in a signal: no memory, or a fault that nobody could serve.
_NO_PAGES = (errno.ENOMEM, errno.EFAULT)


@dataclass(frozen=True)
class BlockLayout:
    """What blocks of one kind have in common.

    Attributes:
        nbytes: Bytes of a block that are used; it is whole pages.
        grain: Copies between host and device do not cross multiples of this; None: they may be anywhere.
        part: A block is wanted in parts that end at multiples of this, itself one of `grain`; None: as a whole.
        in_place: Kernels read it here and there, and copies go through `managed_memory.on_device`: it is managed
            memory where the device has that.

    Raises:
        ValueError: A size below 1, or a part that is not whole grains.
    """

    nbytes: int
    grain: int | None = None
    part: int | None = None
    in_place: bool = False

    def __post_init__(self) -> None:
        if self.nbytes < 1:
            raise ValueError(f"nbytes={self.nbytes} must be at least 1")
        if self.grain is not None and self.grain < 1:
            raise ValueError(f"grain={self.grain} must be at least 1, or None")
        if self.part is not None and (self.part < 1 or self.part % (self.grain or 1)):
            raise ValueError(f"part={self.part} must be at least 1 and a multiple of grain={self.grain}, or None")

    @property
    def size(self) -> int:
        """Bytes of a block, whole pages."""
        return -(-self.nbytes // PAGE) * PAGE

    @property
    def ends(self) -> list[int]:
        """Where the parts end that are locked as one: whole pages, and at least `PART_BYTES` but for the last."""
        if self.part is None:
            return [self.size]
        step = math.lcm(self.part, PAGE)
        step *= max(1, PART_BYTES // step)
        return [*range(step, self.size, step), self.size]

    @property
    def step(self) -> int:
        """Where a part may be split: multiples of this, from the block's beginning."""
        return self.size if self.grain is None else math.lcm(self.grain, PAGE)


@dataclass(eq=False)
class HostBlock:
    """Host memory and the pieces of it, (address, bytes), that `device` reaches and that are not swapped out.

    A private mapping, whose pieces are page-locked, or managed memory, which is never swapped out.

    Attributes:
        memory: The mapping; None: managed memory.
        holders: Pools that hold it.
        pageable: Whether the driver refused to lock it as a whole.
    """

    layout: BlockLayout
    device: torch.device
    memory: mmap.mmap | None
    address: int
    pieces: list[tuple[int, int]] = field(default_factory=list)
    holders: int = 1
    pageable: bool = False

    @classmethod
    def map(cls, layout: BlockLayout, device: torch.device) -> HostBlock:
        """Memory that takes no pages yet, and reads zeros.

        Raises:
            MemoryError: The system gives no such mapping.
        """
        managed = managed_memory.allocate(device, layout.size) if layout.in_place else None
        if managed is not None:
            return cls(layout, device, None, managed)
        # Private, since shared memory gets no huge pages by default: with them a block is touched and locked
        # several times as fast.
        private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
        try:
            memory = mmap.mmap(-1, layout.size, **private)
        except OSError as error:
            raise MemoryError(f"no {layout.size / 2**20:.0f} MiB of host memory for the KV cache: {error}") from error
        # Refused where the system has none. A forked child must not copy what the device may be writing.
        for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):
            with contextlib.suppress(AttributeError, OSError):
                memory.madvise(getattr(mmap, advice))
        return cls(layout, device, memory, torch.frombuffer(memory, dtype=torch.uint8).data_ptr())

    @property
    def size(self) -> int:
        """Bytes, whole pages."""
        return self.layout.size

    @property
    def managed(self) -> bool:
        """Whether it is managed memory."""
        return self.memory is None

    @property
    def locked_bytes(self) -> int:
        """Bytes that are page-locked."""
        return sum(size for _, size in list(self.pieces))

    def tensor(self) -> Tensor:
        """The bytes that are used, uint8 `[nbytes]`."""
        memory = self.memory or (ctypes.c_ubyte * self.size).from_address(self.address)
        return torch.frombuffer(memory, dtype=torch.uint8, count=self.layout.nbytes)

    def lock(self, first: int, last: int) -> int:
        """Page-lock bytes `first` to `last`, whole or in the largest pieces that the driver takes, or nothing of them.

        Returns:
            0, or CUDA's code of the refusal.
        """
        taken: list[int] = []
        pending = [(self.address + first, last - first)]
        while pending:
            address, size = pending.pop()
            # Listed first: whatever interrupts the call, `unlock` finds it.
            self.pieces.append((address, size))
            code = page_locking.lock_pages(self.device, address, size) if not self.managed else 0
            if code == 0:
                taken.append(address)
                continue
            self.pieces.pop()
            half = size // 2 // self.layout.step * self.layout.step
            if half >= SMALLEST_PIECE:
                pending += [(address + half, size - half), (address, half)]
                continue
            # A copy must not cross from memory that is locked to memory that is not.
            for start in taken:
                page_locking.unlock_pages(self.device, start)
            self.pieces = [piece for piece in self.pieces if piece[0] not in taken]
            return code
        return 0

    def missing(self) -> list[tuple[int, int]]:
        """Parts that are not locked, by their first and last byte."""
        ends = self.layout.ends
        locked = {address - self.address for address, _ in self.pieces}
        return [span for span in zip([0, *ends], ends, strict=False) if span[0] not in locked]

    def unlock(self) -> None:
        """Unlock all of it; the device is done with it."""
        while self.pieces:
            address, _ = self.pieces.pop()
            if not self.managed:
                page_locking.unlock_pages(self.device, address)

    def release(self) -> None:
        """Unlock it and give its pages back, and managed memory's addresses with them.

        A mapping reads zeros then, and is unmapped with the last tensor over it.
        """
        self.unlock()
        if self.memory is None:
            managed_memory.free(self.device, self.address)
            return
        # Tensors over the block may outlive this, in the frames of an exception for one: the pages must not.
        with contextlib.suppress(AttributeError, OSError):
            self.memory.madvise(mmap.MADV_DONTNEED)


def touch(address: int, size: int) -> None:
    """Fault in the pages of a mapping that reads zeros, without the interpreter lock.

    Raises:
        MemoryError: The system has no pages for them.
    """
    code = _populate(address, size)
    if code in _NO_PAGES:
        raise MemoryError(f"no {size / 2**20:.0f} MiB of host memory for the KV cache: {os.strerror(code)}")
    if code:
        ctypes.memset(address, 0, size)


def _populate(address: int, size: int) -> int:
    """0 where the system did it by itself, or its code; an older one does not know how."""
    libc = _libc()
    if libc is None:
        return errno.ENOSYS
    if libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), _POPULATE_WRITE) == 0:
        return 0
    return ctypes.get_errno()


@functools.cache
def _libc() -> ctypes.CDLL | None:
    try:
        libc = ctypes.CDLL(None, use_errno=True)
    except (OSError, TypeError):
        return None
    return libc if hasattr(libc, "madvise") else None
