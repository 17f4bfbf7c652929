"""The Triton kernel of the append on CPU tensors; run by test_append.py under TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch

from ds_offload.kernels.append import _launch
from ds_offload.kernels.segment_table import SegmentTable

SIZE = 5


@pytest.mark.parametrize("positions", [(11, -1), (4, 0), (5, 4), (15, 5), (20, 2**40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kv_heads", "dim"), [(1, 1), (3, 5), (2, 64)])
def test_kernel_writes_the_rows_of_one_layer_and_no_other(
    kv_heads: int, dim: int, dtype: torch.dtype, positions: tuple[int, int]
) -> None:
    generator = torch.Generator().manual_seed(dim)
    tensors = [
        [torch.randn(3, kv_heads, SIZE, 2, dim, generator=generator).to(dtype) for _ in range(n)] for n in (3, 1)
    ]
    addresses = torch.zeros(2, 4, dtype=torch.int64)
    for b, segments in enumerate(tensors):
        for n, segment in enumerate(segments):
            addresses[b, n] = segment.data_ptr()
    expected = [[segment.clone() for segment in segments] for segments in tensors]
    rows = torch.randn(2, kv_heads, 2, dim, generator=generator).to(dtype)
    for b, position in enumerate(positions):
        if 0 <= position < SIZE * len(tensors[b]):
            expected[b][position // SIZE][1, :, position % SIZE] = rows[b]
    _launch(SegmentTable(tensors, addresses, SIZE), 1, torch.tensor(positions), rows)
    for actual, wanted in zip(tensors, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(actual, wanted, strict=True))
