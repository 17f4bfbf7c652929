"""Segments in files: a store that may be larger than the host's memory."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import shutil
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from ds_offload.errors import InputError, MemoryPlanError

_ANOTHER = "give kv_dir (--kv-dir) a folder on another disk"
# File systems that are memory themselves: the plan would count what is there as free.
_IN_MEMORY = ("tmpfs", "ramfs")


class FileSegments:
    """Blocks of host memory that are files without a name in a folder, one each, never page-locked.

    The system keeps as much of them in memory as it has to spare, and writes and reads the
    rest by itself: the pages of a row, and none around them (`read_ahead`). A file has no
    name from the moment it is made, so that nothing is left of it however the process ends,
    and its place on the disk is taken at once, so that a full disk is an error here and not
    a signal at some later write. The bytes go when the last tensor over a block does. One
    thread calls the pool.

    Args:
        folder: Where; see `disk_room`.
        device: The device that computes. A CUDA device cannot read such a block in place.
    """

    def __init__(self, folder: str | Path, device: torch.device) -> None:
        self._folder = Path(os.path.expanduser(folder))
        self._cuda = device.type == "cuda"
        self._blocks: list[Tensor] = []

    @property
    def nbytes(self) -> int:
        """Bytes of the files, written to or not."""
        return sum(block.nbytes for block in self._blocks)

    @property
    def pinned_bytes(self) -> int:
        """None of them is page-locked."""
        return 0

    def left_pageable(self, block: Tensor) -> bool:
        """Whether rows of a block must pass through the CPU on their way to the device."""
        return self._cuda

    @property
    def busy(self) -> bool:
        """Never: a block is ready when it is there."""
        return False

    @property
    def refusals(self) -> int:
        """None of them was to be page-locked."""
        return 0

    def begin(self, nbytes: int, *, blocks: int = 1, grain: int | None = None, part: int | None = None) -> list[Tensor]:
        """New blocks `[nbytes]` uint8, zeroed and ready: all of them, or none.

        Args:
            grain, part: Of page-locked blocks only.

        Raises:
            MemoryPlanError: The disk has no room for them.
            InputError: The folder cannot be written to.
            MemoryError: The process may have no further mapping.
        """
        before = len(self._blocks)
        try:
            return [self._make(nbytes) for _ in range(blocks)]
        except BaseException:
            # What was made would keep the last of the disk from a second try.
            del self._blocks[before:]
            raise

    def is_ready(self, block: Tensor, nbytes: int) -> bool:
        """Always."""
        return True

    def wait(self, block: Tensor, nbytes: int | None = None) -> None:
        """Nothing is to be waited for."""

    def adopt(self, other: FileSegments, block: Tensor) -> None:
        """Hold a block that `other` allocated, too."""
        self._blocks.append(block)

    def close(self, keep: bool = False) -> None:
        """Let go of every block; each file goes with the last tensor over it, whatever `keep` is."""
        self._blocks.clear()

    def _make(self, nbytes: int) -> Tensor:
        size = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        try:
            file = _nameless_file(self._folder)
        except OSError as error:
            raise InputError(f"cannot write to kv_dir={self._folder}: {error.strerror}; {_ANOTHER}") from None
        try:
            os.posix_fallocate(file, 0, size)
            block = torch.from_file(f"/proc/self/fd/{file}", shared=True, size=size, dtype=torch.uint8)
        except OSError as error:
            raise MemoryPlanError(
                f"kv_dir={self._folder} has no room for {size / 2**20:.0f} MiB of K/V after "
                f"{self.nbytes / 2**30:.2f} GiB ({error.strerror}); free some, or {_ANOTHER}"
            ) from None
        except RuntimeError as error:
            raise MemoryError(f"no mapping of {size / 2**20:.0f} MiB for the KV cache: {error}") from error
        finally:
            os.close(file)
        # Rows are far apart. By itself the system reads 128 KiB around each: of 6K tokens nearly all at every step.
        _advise(block, mmap.MADV_RANDOM)
        self._blocks.append(block)
        return block[:nbytes]


def read_ahead(rows: Tensor) -> None:
    """Have the system read rows `[Hkv, n, 2, D]` of a block, which are about to be read; a head's are contiguous."""
    for head in rows:
        _advise(head, mmap.MADV_WILLNEED)


def disk_room(folder: str | Path) -> int:
    """Bytes that files of segments may take in `folder`.

    Raises:
        InputError: It is no folder, cannot be written to, is memory itself, or the system is not Linux.
    """
    place = Path(os.path.expanduser(folder))
    if not place.is_dir():
        raise InputError(f"kv_dir={folder} is no folder; make it, or give another one")
    if not os.access(place, os.W_OK | os.X_OK):
        raise InputError(f"cannot write to kv_dir={folder}; {_ANOTHER}")
    if not hasattr(os, "posix_fallocate") or not os.path.isdir("/proc/self/fd"):
        raise InputError(f"kv_dir={folder} needs Linux, whose files can be reserved and mapped; leave it out")
    kind = _file_system(place)
    if kind in _IN_MEMORY:
        raise InputError(f"kv_dir={folder} is a file system in memory ({kind}), which saves none; {_ANOTHER}")
    return shutil.disk_usage(place).free


def _advise(rows: Tensor, advice: int) -> None:
    """Tell the system how the pages of contiguous rows will be used; a hint, whose refusal costs time alone."""
    first = rows.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    size = rows.data_ptr() + rows.nbytes - first
    ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), advice)


def _nameless_file(folder: Path) -> int:
    """A new file of `folder` that has no name, open for reading and writing."""
    with contextlib.suppress(OSError):
        # Some file systems have none such, and neither have old kernels.
        return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    file, name = tempfile.mkstemp(prefix=".ds-offload-", dir=folder)
    os.unlink(name)
    return file


def _file_system(folder: Path) -> str | None:
    """The kind of file system that a folder is on; None where the system does not say."""
    number = os.stat(folder).st_dev
    device = f"{os.major(number)}:{os.minor(number)}"
    with contextlib.suppress(OSError, ValueError), open("/proc/self/mountinfo", encoding="utf-8") as mounts:
        for line in mounts:
            fields = line.split()
            if fields[2] == device:
                return fields[fields.index("-") + 1]
    return None
