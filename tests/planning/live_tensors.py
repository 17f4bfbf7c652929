"""The most bytes of tensors that are alive at once, counted as they are made."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveTensors(TorchDispatchMode):
    """Counts the storages of every operator's results; use as a context manager.

    Tensors made before do not count, nor does what an operator takes and gives back by itself.

    Attributes:
        peak: Most bytes so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {id(value.untyped_storage()) for value in tree_iter((args, kwargs)) if isinstance(value, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, torch.Tensor):
                self._count(value.untyped_storage(), before)
        return result

    def _count(self, storage: torch.UntypedStorage, before: set[int]) -> None:
        number, nbytes = id(storage), storage.nbytes()
        if number in self._seen or number in before:
            return
        self._seen.add(number)
        self._live += nbytes
        self.peak = max(self.peak, self._live)
        weakref.finalize(storage, self._forget, number, nbytes)

    def _forget(self, number: int, nbytes: int) -> None:
        self._seen.discard(number)
        self._live -= nbytes
