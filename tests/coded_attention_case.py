"""What attention over a window and quantised rows is computed from in tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from kv_code_case import make_code, make_rows
from torch import Tensor

from ds_offload.kernels.kv_codec import RowCode, encode_rows_reference
from ds_offload.kernels.segment_table import SegmentTable
from ds_offload.kernels.slot_attention_launch import StoredRows


@dataclass(frozen=True)
class CodedCase:
    """The arguments of `coded_attention`; `plain` are the rows before they were quantised, float32."""

    query: Tensor
    window: Tensor
    rows: Tensor
    code: RowCode
    slots: Tensor
    plain: Tensor

    def arguments(self, **changes: Any) -> dict[str, Any]:
        """By name."""
        names = ("query", "window", "rows", "code", "slots")
        return {name: getattr(self, name) for name in names} | {"scaling": 0.2} | changes

    def stored(self, size: int) -> StoredRows:
        """The rows as layer 1 of 2 of a store of segments of `size` tokens; the other layer's are anything."""
        padded = torch.nn.functional.pad(self.rows, (0, 0, 0, 0, 0, -self.rows.shape[2] % size))
        segments = [[part.expand(2, *part.shape).clone() for part in one.split(size, 1)] for one in padded]
        for one in segments:
            for segment in one:
                segment[0] = 0xFF
        addresses = torch.zeros(len(padded), len(segments[0]) + 1, dtype=torch.int64)
        for b, one in enumerate(segments):
            addresses[b, :-1] = torch.tensor([segment.data_ptr() for segment in one])
        table = SegmentTable(segments, addresses.to(self.rows.device), size)
        return StoredRows(table, 1, self.rows.shape[1], self.rows.shape[4], torch.uint8)


def make_case(
    bits: int, dim: int, kv_heads: int, group: int, window: int, count: int, dtype: torch.dtype, device: str = "cpu"
) -> CodedCase:
    """Two sequences of `window` rows as they are and `count` quantised ones, in any order, a third of each list -1.

    Rows that no slot names hold NaN, or bytes that are NaN.
    """
    generator = torch.Generator().manual_seed(dim + count)
    code = make_code(bits, dim, kv_heads)
    by_head = RowCode(code.layout, code.factor[:, None])
    query = torch.randn(2, kv_heads * group, dim, generator=generator).to(dtype)
    near = make_rows(by_head, (2, kv_heads, window), dtype)
    plain = make_rows(by_head, (2, kv_heads, count + 3), torch.float32)
    rows = encode_rows_reference(plain, by_head)
    slots = torch.empty(2, kv_heads, 0, dtype=torch.int64)
    for listed, capacity, values in ((window, window, near), (count, count + 3, rows)):
        order = torch.rand(2, kv_heads, capacity, generator=generator).argsort(-1)[..., :listed]
        skipped = torch.rand(order.shape, generator=generator) < 0.3
        if listed:
            skipped[..., listed // 2] = False
        order = order.masked_fill(skipped, -1)
        named = torch.zeros(2, kv_heads, capacity + 1, dtype=torch.bool).scatter_(-1, order % (capacity + 1), True)
        values.masked_fill_(~named[..., :capacity, None, None], 0xFF if values.dtype == torch.uint8 else torch.nan)
        slots = torch.cat((slots, order), -1)
    on_device = RowCode(code.layout, code.factor.to(device))
    return CodedCase(*(x.to(device) for x in (query, near, rows)), on_device, slots.to(device), plain.to(device))
