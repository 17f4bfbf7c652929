"""Appended rows: each lands in its place, every other byte of the store stays."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from segment_case import LAYERS, store

from ds_offload.kernels.append import append_rows, append_rows_reference
from ds_offload.kernels.segment_table import SegmentTable

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEGMENTS = [3, 1, 2, 1]
SIZE = 5
# The first, the last of a segment, skipped, the first of a segment.
POSITIONS = ((14, 4, -1, 0), (5, -1, 9, 2), (0, 0, 0, 0), (-1, -7, -1, -1))


def contents(table: SegmentTable) -> list[torch.Tensor]:
    return [segment.cpu().clone() for segments in table.tensors for segment in segments]


def expected_contents(
    table: SegmentTable, layer: int, positions: tuple[int, ...], rows: torch.Tensor
) -> list[torch.Tensor]:
    """What the store holds once `rows` [B, Hkv, 2, D] are appended to `layer`."""
    copies = iter(contents(table))
    result = []
    for b, segments in enumerate(table.tensors):
        for n in range(len(segments)):
            copy = next(copies)
            if positions[b] >= 0 and positions[b] // SIZE == n:
                copy[layer, :, positions[b] % SIZE] = rows[b].cpu()
            result.append(copy)
    return result


def new_rows(kv_heads: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(99)
    return torch.randn(len(SEGMENTS), kv_heads, 2, dim, generator=generator).to(dtype)


@pytest.mark.parametrize("append", [append_rows, append_rows_reference])
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kv_heads", "dim"), [(1, 1), (3, 64), (2, 5)])
def test_rows_land_in_their_place(
    append: Callable, kv_heads: int, dim: int, dtype: torch.dtype, positions: tuple[int, ...]
) -> None:
    table = store(SEGMENTS, SIZE, kv_heads, dim, dtype)
    rows = new_rows(kv_heads, dim, dtype)
    expected = expected_contents(table, 1, positions, rows)
    append(table, 1, torch.tensor(positions), rows)
    assert all(torch.equal(a, b) for a, b in zip(contents(table), expected, strict=True))


@pytest.mark.parametrize("append", [append_rows, append_rows_reference])
def test_strided_rows(append: Callable) -> None:
    table = store(SEGMENTS, SIZE, 2, 8, torch.float32)
    rows = new_rows(2, 16, torch.float32)[..., ::2]
    expected = expected_contents(table, 0, POSITIONS[0], rows)
    append(table, 0, torch.tensor(POSITIONS[0]), rows)
    assert all(torch.equal(a, b) for a, b in zip(contents(table), expected, strict=True))


def test_no_sequences() -> None:
    empty = SegmentTable([], torch.zeros(0, 1, dtype=torch.int64), SIZE)
    append_rows(empty, 0, torch.zeros(0, dtype=torch.int64), torch.zeros(0, 2, 2, 8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions": torch.tensor([0, 5, 0, 0])}, "sequence 1: token 5 has no segment; it has 1"),
        ({"positions": torch.tensor([0, 0, 0])}, "positions .* must be int64"),
        ({"positions": torch.zeros(4, dtype=torch.int32)}, "positions .* must be int64"),
        ({"layer": LAYERS}, "layer=3"),
        ({"rows": torch.zeros(1, 4, 2, 2, 8)}, r"must be \[B, Hkv, 2, D\]"),
        ({"rows": torch.zeros(4, 2, 2, 8).half()}, "the rows need torch.float16"),
        ({"rows": torch.zeros(3, 2, 2, 8), "positions": torch.zeros(3, dtype=torch.int64)}, "the table has 4"),
    ],
)
def test_wrong_arguments_are_named(change: dict, message: str) -> None:
    arguments = {
        "table": store(SEGMENTS, SIZE, 2, 8, torch.float32),
        "layer": 0,
        "positions": torch.zeros(4, dtype=torch.int64),
        "rows": torch.zeros(4, 2, 2, 8),
    }
    append_rows(**arguments)
    with pytest.raises(ValueError, match=message):
        append_rows(**(arguments | change))


def test_triton_kernel_in_the_interpreter(interpret: Callable[[str], None]) -> None:
    interpret("interpreted_append.py")


@pytest.mark.gpu
@pytest.mark.parametrize("where", ["pinned", "device"])
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kv_heads", "dim"), [(1, 1), (3, 64), (2, 5), (1, 128)])
def test_cuda(where: str, kv_heads: int, dim: int, dtype: torch.dtype, positions: tuple[int, ...]) -> None:
    table = store(SEGMENTS, SIZE, kv_heads, dim, dtype, device="cuda", where=where)
    rows = new_rows(kv_heads, dim, dtype).cuda()
    expected = expected_contents(table, 1, positions, rows)
    on_device = torch.tensor(positions).cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        append_rows(table, 1, on_device, rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(contents(table), expected, strict=True))


@pytest.mark.gpu
def test_cuda_skips_positions_without_a_segment() -> None:
    table = store(SEGMENTS, SIZE, 2, 8, torch.float32, device="cuda", where="pinned")
    before = contents(table)
    append_rows(table, 0, torch.tensor([15, 5, 20, 2**40]).cuda(), new_rows(2, 8, torch.float32).cuda())
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(contents(table), before, strict=True))


@pytest.mark.gpu
def test_cuda_graph_writes_the_positions_it_is_replayed_with() -> None:
    table = store(SEGMENTS, SIZE, 2, 64, torch.bfloat16, device="cuda", where="pinned")
    rows = new_rows(2, 64, torch.bfloat16).cuda()
    positions = torch.full((4,), -1, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        append_rows(table, 1, positions, rows)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        append_rows(table, 1, positions, rows)
    for replayed in POSITIONS[:2]:
        rows.neg_()
        positions.copy_(torch.tensor(replayed))
        expected = expected_contents(table, 1, replayed, rows)
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(contents(table), expected, strict=True))
