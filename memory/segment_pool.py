"""Where a store on the host takes its segments from: page-locked memory, or files."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor


class SegmentPool(Protocol):
    """Blocks of host memory that live until the pool is closed; `PinnedPool` and `FileSegments` are such."""

    @property
    def nbytes(self) -> int:
        """Bytes held now, blocks made ahead among them."""

    @property
    def pinned_bytes(self) -> int:
        """Bytes held and page-locked now."""

    def prepare(self, nbytes: int, *, blocks: int = 1, grain: int | None = None) -> None:
        """Make blocks that `allocate` with the same arguments takes later."""

    def allocate(self, nbytes: int, *, grain: int | None = None) -> Tensor:
        """A new block `[nbytes]` uint8, zeroed."""

    def adopt(self, other: Any, block: Tensor) -> None:
        """Hold a block of `other`, a pool of the same kind, too."""

    def left_pageable(self, block: Tensor) -> bool:
        """Whether no kernel of the device that computes may read the block in place."""

    def close(self) -> None:
        """Give every block back that no other pool holds."""
