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

    @property
    def busy(self) -> bool:
        """Whether there are blocks that nobody waited for yet."""

    @property
    def refusals(self) -> int:
        """Blocks that became pageable after they were begun."""

    def begin(self, nbytes: int, *, blocks: int = 1, grain: int | None = None, part: int | None = None) -> list[Tensor]:
        """New blocks `[nbytes]` uint8, made ready part by part."""

    def is_ready(self, block: Tensor, nbytes: int) -> bool:
        """Whether the first `nbytes` bytes of a block may be written without waiting."""

    def wait(self, block: Tensor, nbytes: int | None = None) -> None:
        """Wait until the first `nbytes` bytes of a block, or all of it, may be written."""

    def adopt(self, other: Any, block: Tensor) -> None:
        """Hold a block of `other`, a pool of the same kind, too."""

    def left_pageable(self, block: Tensor) -> bool:
        """Whether no kernel of the device that computes may read the block in place."""

    def close(self, keep: bool = False) -> None:
        """Give every block back that no other pool holds; `keep` leaves them to a later pool where there can be one."""
