"""A driver in the place of CUDA's: it keeps what is page-locked, and refuses what it is told to."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

from ds_offload.memory.host_block import PAGE


class FakeDriver:
    """Keeps what is registered, and refuses what `refuses(size, held)` says."""

    def __init__(self) -> None:
        self.registered: dict[int, int] = {}
        self.threads: list[str] = []
        self.synchronized = 0
        self.refuses: Callable[[int, int], bool] = lambda size, held: False
        self.most = 0

    def lock(self, device: torch.device, address: int, size: int) -> int:
        assert device == torch.device("cuda", 0) and address % PAGE == 0 and size % PAGE == 0 and size > 0
        self.threads.append(threading.current_thread().name)
        if self.refuses(size, sum(self.registered.values())):
            return 2
        for start, length in self.registered.items():
            assert address + size <= start or start + length <= address, "registered twice"
        self.registered[address] = size
        self.most = max(self.most, sum(self.registered.values()))
        return 0

    def unlock(self, device: torch.device, address: int) -> None:
        assert self.registered.pop(address, None), "was not registered"

    def synchronize(self, device: torch.device) -> None:
        self.synchronized += 1
