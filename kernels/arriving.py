"""Rows that attention fetches from the host itself, head by head, while it attends to heads whose rows are there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ds_offload.kernels.gather import check_gather, gather_launch, gather_rows, row_alignment
from ds_offload.kernels.segment_table import SegmentTable
from ds_offload.kernels.triton_runtime import power_of_two

# What a copying program has in flight: as much as 64 need, and little, so that the first heads are complete early.
TILE_BYTES = 8192


@dataclass(frozen=True)
class Arriving:
    """A gather that is still to be done, by the launch that reads the rows.

    The launch's first programs copy, all heads in turn, and its others wait for their
    head's entries. Which program is among the first is decided by which begins first, by
    a counter, so that no order of the programs can make one wait for another that cannot begin.

    Attributes:
        table, layer, tokens, slots, timer: As for `gather_rows`.
        counts: int32 [B, Hkv], entries of each head that are looked at.
        progress: int32 [B * Hkv + 1, 32], counters in front of each 32: entries fetched of each head, then programs
            begun. They are 0, for one launch.
    """

    table: SegmentTable
    layer: int
    tokens: Tensor
    slots: Tensor
    counts: Tensor
    progress: Tensor
    timer: Tensor | None = None

    def check(self, rows: Any) -> None:
        """Raise ValueError unless everything fits `rows`, a tensor [B, Hkv, C, 2, D] where the fetched rows go."""
        if not isinstance(rows, Tensor):
            raise ValueError("rows that arrive need a tensor to arrive in, not a store's rows")
        check_gather(self.table, self.layer, self.tokens, self.slots, rows, self.counts, self.timer)
        shape = (self.counts.numel() + 1, 32)
        if self.progress.dtype != torch.int32 or self.progress.shape != shape or not self.progress.is_contiguous():
            raise ValueError(f"progress {self.progress.dtype} {tuple(self.progress.shape)} must be int32 {shape}")
        if self.progress.device != rows.device:
            raise ValueError(f"progress is on {self.progress.device}; it must be on {rows.device} like the rows")

    def fetch(self, rows: Any) -> None:
        """Copy the rows, by a launch of its own."""
        gather_rows(self.table, self.layer, self.tokens, self.slots, rows, self.counts, self.timer)


def fetch_arguments(arriving: Arriving | None, rows: Any) -> tuple[tuple[Any, ...], dict[str, Any], int]:
    """What a kernel that begins with a gather into the tensor `rows` is given for it (`kernels/gather_kernels.py`).

    Returns:
        Pointers and numbers, compile-time constants, and the programs that copy: 0 without a gather.
    """
    constants: dict[str, Any] = {
        "FETCHERS": 0,
        "TIMED": False,
        "PAIRS_PAD": 1,
        "FETCH_SEGMENT": 1,
        "ROW_WORDS": 1,
        "WORDS_PAD": 1,
        "FETCH_TILE": 1,
        "FETCH_ALIGNMENT": 4,
    }
    if arriving is None or arriving.tokens.numel() == 0:
        return (*(None,) * 6, 0, 0, 0), constants, 0
    batch, heads, kept = arriving.tokens.shape
    words = rows.view(*rows.shape[:3], 2 * rows.shape[4]).view(torch.int32)
    launch = gather_launch(batch * heads, kept, 4 * words.shape[3], TILE_BYTES)
    constants |= {
        "FETCHERS": launch.programs,
        "TIMED": arriving.timer is not None,
        "PAIRS_PAD": power_of_two(batch * heads),
        "FETCH_SEGMENT": arriving.table.segment_tokens,
        "ROW_WORDS": words.shape[3],
        "WORDS_PAD": power_of_two(words.shape[3]),
        "FETCH_TILE": launch.tile_rows,
        "FETCH_ALIGNMENT": row_alignment(words),
    }
    addresses = arriving.table.addresses
    lists = arriving.tokens.contiguous(), arriving.slots.contiguous(), arriving.counts
    numbers = arriving.layer, addresses.shape[1], kept
    return (addresses, *lists, arriving.progress, arriving.timer, *numbers), constants, launch.programs
