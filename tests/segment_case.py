"""Random K/V rows of three layers in segments, and the table that says where they are."""

from __future__ import annotations

import torch

from ds_offload.kernels.segment_table import SegmentTable

LAYERS = 3


def store(
    segments: list[int], size: int, kv_heads: int, dim: int, dtype: torch.dtype, *, device: str = "cpu", where: str = ""
) -> SegmentTable:
    """A table of one sequence per entry of `segments`; `where` is "", "pinned" or "device"."""
    generator = torch.Generator().manual_seed(size + dim)
    tensors = []
    for count in segments:
        rows = [torch.randn(LAYERS, kv_heads, size, 2, dim, generator=generator).to(dtype) for _ in range(count)]
        if where:
            rows = [row.pin_memory() if where == "pinned" else row.to(device) for row in rows]
        tensors.append(rows)
    addresses = torch.zeros(len(segments), max(segments, default=0) + 1, dtype=torch.int64)
    for b, rows in enumerate(tensors):
        for n, row in enumerate(rows):
            addresses[b, n] = row.data_ptr()
    return SegmentTable(tensors, addresses.to(device), size)
