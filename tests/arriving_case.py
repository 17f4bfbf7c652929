"""Attention whose rows are partly still in a store: as they are, or quantised."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from coded_attention_case import make_case
from torch import Tensor

from ds_offload.kernels.arriving import Arriving
from ds_offload.kernels.coded_attention import coded_attention
from ds_offload.kernels.kv_codec import RowCode
from ds_offload.kernels.segment_table import SegmentTable
from ds_offload.kernels.slot_attention import slot_attention

SCALING = 0.2
WINDOW = 5


@dataclass(frozen=True)
class ArrivingCase:
    """Two sequences that attend to WINDOW rows and to `kept` selected ones, of which some are missing.

    Attributes:
        query: [2, H, D].
        rows: [2, Hkv, C, 2, D or P], every missing row poisoned.
        whole: The same with what is missing in its place.
        slots: [2, Hkv, WINDOW + kept].
        arriving: What is missing; each use takes a fresh one by `fresh`.
        window, code: Where rows are quantised.
    """

    query: Tensor
    rows: Tensor
    whole: Tensor
    slots: Tensor
    arriving: Arriving
    window: Tensor | None = None
    code: RowCode | None = None

    def fresh(self, **changes: Any) -> Arriving:
        """`arriving` for one launch."""
        return replace(self.arriving, **({"progress": torch.zeros_like(self.arriving.progress)} | changes))

    def counted(self) -> Tensor:
        """`progress` as if every entry were fetched already."""
        progress = torch.zeros_like(self.arriving.progress)
        progress[:-1, 0] = self.arriving.counts.flatten()
        return progress

    def attend(self, rows: Tensor, arriving: Arriving | None = None) -> Tensor:
        """Attention over `rows`."""
        if self.code is None:
            return slot_attention(self.query, rows, self.slots, SCALING, arriving=arriving)
        assert self.window is not None
        return coded_attention(self.query, self.window, rows, self.code, self.slots, SCALING, arriving=arriving)


def make_arriving_case(
    dtype: torch.dtype,
    *,
    bits: int = 16,
    kv_heads: int = 2,
    group: int = 1,
    dim: int = 32,
    kept: int = 150,
    missing: float = 0.3,
    device: str = "cpu",
    pinned: bool = False,
) -> ArrivingCase:
    """A case; `missing` is the share of rows that are, of the last head nothing and of the first all."""
    generator = torch.Generator().manual_seed(dim + kept)
    window, code = None, None
    if bits == 16:
        query = torch.randn(2, kv_heads * group, dim, generator=generator).to(dtype)
        whole = torch.randn(2, kv_heads, WINDOW + kept, 2, dim, generator=generator).to(dtype)
        slots = torch.rand(2, kv_heads, kept, generator=generator).argsort(-1) + WINDOW
        slots = torch.cat((torch.arange(WINDOW).expand(2, kv_heads, -1), slots), -1)
    else:
        coded = make_case(bits, dim, kv_heads, group, WINDOW, kept, dtype)
        query, whole, slots, window, code = coded.query, coded.rows, coded.slots, coded.window, coded.code
    selected = slots[..., WINDOW:]
    lacks = (torch.rand(selected.shape, generator=generator) < missing) & (selected >= 0)
    lacks[0, 0], lacks[-1, -1] = selected[0, 0] >= 0, False
    counts = lacks.sum(-1, dtype=torch.int32)
    # The token of a row is three times its slot.
    order = lacks.int().argsort(dim=-1, descending=True, stable=True)
    behind = torch.arange(kept) >= counts[..., None]
    places = selected.gather(-1, order).masked_fill(behind, -(10**9))
    tokens = (3 * places).masked_fill(behind, 10**9)
    rows = whole.clone()
    poison = 0xFF if bits < 16 else torch.nan
    named = torch.zeros(*whole.shape[:3], dtype=torch.bool).scatter_(-1, selected.clamp(min=0), lacks)
    rows.masked_fill_(named[..., None, None], poison)
    # Page-locking is slow: few segments.
    table = _stored(whole, poison, device, pinned, segment=2048 if pinned else 32)
    progress = torch.zeros(2 * kv_heads + 1, 32, dtype=torch.int32, device=device)
    arriving = Arriving(table, 1, tokens.to(device), places.to(device), counts.to(device), progress)
    if code is not None and window is not None:
        window, code = window.to(device), RowCode(code.layout, code.factor.to(device))
    tensors = (x.to(device) for x in (query, rows, whole, slots))
    return ArrivingCase(*tensors, arriving, window, code)


def _stored(whole: Tensor, poison: float, device: str, pinned: bool, segment: int) -> SegmentTable:
    """Layer 1 of 2: row 3 * n of a head is row n of `whole`."""
    batch, kv_heads, count = whole.shape[:3]
    tokens = -(-3 * count // segment) * segment
    spread = torch.full((batch, kv_heads, tokens, *whole.shape[3:]), poison, dtype=whole.dtype)
    spread[:, :, : 3 * count : 3] = whole
    segments = []
    for one in spread:
        parts = [part.expand(2, *part.shape).clone() for part in one.split(segment, 1)]
        for part in parts:
            part[0] = poison
        segments.append([part.pin_memory() if pinned else part for part in parts])
    addresses = torch.tensor([[part.data_ptr() for part in parts] for parts in segments], dtype=torch.int64)
    return SegmentTable(segments, addresses.to(device), segment)
