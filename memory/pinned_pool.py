"""Host memory that the GPU reads and writes directly: mapped, touched, then registered."""

from __future__ import annotations

import ctypes
import mmap
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

_TOUCH_THREADS = 16
_PAGE = mmap.PAGESIZE


class PinnedPool:
    """Blocks of host memory, page-locked for `device` when it is a CUDA device, plain otherwise.

    Making the pool allocates nothing. Blocks live until `close`, which unregisters
    them on every way out of the `with` statement; tensors over a block must not be
    used after that.

    An anonymous mapping touched by several threads and then registered is ready about
    twice as fast as `torch.empty(..., pin_memory=True)`, and is not rounded up to a
    power of two.
    """

    def __init__(self, device: torch.device) -> None:
        self._pin = device.type == "cuda"
        self._blocks: list[tuple[int, int, mmap.mmap]] = []

    def __enter__(self) -> PinnedPool:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return sum(size for _, size, _ in self._blocks)

    @property
    def pinned_bytes(self) -> int:
        """Bytes held and page-locked now."""
        return self.nbytes if self._pin else 0

    def allocate(self, nbytes: int) -> Tensor:
        """A new block `[nbytes]` uint8, zeroed.

        Raises:
            MemoryError: The host has no such block, or the driver refused to lock it.
        """
        size = -(-nbytes // _PAGE) * _PAGE
        try:
            block = mmap.mmap(-1, size)
        except OSError as error:
            raise MemoryError(f"no {size / 2**20:.0f} MiB of host memory for the KV cache: {error}") from error
        tensor = torch.frombuffer(block, dtype=torch.uint8, count=nbytes)
        address = tensor.data_ptr()
        if self._pin:
            _touch(address, size)
            code = int(torch.cuda.cudart().cudaHostRegister(address, size, 0))
            if code != 0:
                raise MemoryError(
                    f"the driver refused to page-lock {size / 2**20:.0f} MiB (CUDA error {code}) after "
                    f"{self.nbytes / 2**30:.1f} GiB; free host memory, raise `ulimit -l`, or shorten the context"
                )
        self._blocks.append((address, size, block))
        return tensor

    def close(self) -> None:
        """Unregister and forget every block. The mapping goes with the last tensor over it."""
        try:
            if self._pin and self._blocks:
                torch.cuda.synchronize()
        finally:
            while self._blocks:
                address, _, _ = self._blocks.pop()
                if self._pin:
                    torch.cuda.cudart().cudaHostUnregister(address)


def _touch(address: int, size: int) -> None:
    """Fault every page in, several threads at once (memset releases the interpreter lock)."""
    share = -(-size // _TOUCH_THREADS // _PAGE) * _PAGE
    with ThreadPoolExecutor(_TOUCH_THREADS) as pool:
        for start in range(0, size, share):
            pool.submit(ctypes.memset, address + start, 0, min(share, size - start))
