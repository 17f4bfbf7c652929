"""Gathered rows against indexing, row by row; every copy is exact."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from gather_case import assert_same_bits, choose, naive, poisoned
from segment_case import LAYERS, store

from ds_offload.kernels import gather_cpu
from ds_offload.kernels.gather import gather_launch, gather_rows, gather_rows_reference
from ds_offload.kernels.segment_table import SegmentTable

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES = [
    # segments per sequence, S, Hkv, D, K, C
    ([1], 1, 1, 1, 1, 1),
    ([3, 1, 0], 5, 3, 64, 7, 16),
    ([2, 4], 37, 2, 5, 40, 40),
    ([1, 1], 100, 4, 80, 33, 90),
    ([5], 16, 1, 256, 80, 80),
    ([2], 300, 8, 32, 257, 300),
]


@pytest.mark.parametrize("gather", [gather_rows, gather_rows_reference])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("segments", "size", "kv_heads", "dim", "kept", "capacity"), CASES)
def test_rows_land_in_their_slots_and_nowhere_else(
    gather: Callable, dtype: torch.dtype, segments: list[int], size: int, kv_heads: int, dim: int, kept: int, capacity
) -> None:
    table = store(segments, size, kv_heads, dim, dtype)
    tokens, slots = choose(table, kv_heads, kept, capacity)
    for layer in (0, LAYERS - 1):
        out = poisoned(len(segments), kv_heads, capacity, 2, dim, dtype=dtype)
        expected = out.clone()
        naive(table, layer, tokens, slots, expected)
        assert gather(table, layer, tokens, slots, out) is out
        assert_same_bits(out, expected)


@pytest.mark.parametrize("gather", [gather_rows, gather_rows_reference])
def test_strided_result(gather: Callable) -> None:
    table = store([2, 1], 6, 2, 8, torch.float16)
    tokens, slots = choose(table, 2, 5, 7)
    buffer = poisoned(2, 2, 20, 2, 8, dtype=torch.float16)
    expected = buffer.clone()
    naive(table, 1, tokens, slots, expected[:, :, 4:11])
    gather(table, 1, tokens, slots, buffer[:, :, 4:11])
    assert_same_bits(buffer, expected)


def test_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    table = store([3, 2], 50, 3, 16, torch.float32)
    tokens, slots = choose(table, 3, 99, 120)
    alone = gather_rows(table, 1, tokens, slots, poisoned(2, 3, 120, 2, 16, dtype=torch.float32))
    monkeypatch.setattr(gather_cpu, "BYTES_PER_THREAD", 1)
    for threads in (2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        out = gather_rows(table, 1, tokens, slots, poisoned(2, 3, 120, 2, 16, dtype=torch.float32))
        assert_same_bits(out, alone)


@pytest.mark.parametrize("gather", [gather_rows, gather_rows_reference])
def test_nothing_to_gather(gather: Callable) -> None:
    table = store([1], 4, 2, 8, torch.float32)
    none = torch.zeros(1, 2, 0, dtype=torch.int64)
    out = poisoned(1, 2, 3, 2, 8, dtype=torch.float32)
    assert gather(table, 0, none, none, out).isnan().all()
    skipped = torch.full((1, 2, 3), -1)
    assert gather(table, 0, skipped, skipped, out).isnan().all()
    empty = store([], 4, 2, 8, torch.float32)
    assert gather(empty, 0, none[:0], none[:0], out[:0]).shape == (0, 2, 3, 2, 8)


@pytest.mark.parametrize("token", [8, 1000])
@pytest.mark.parametrize("gather", [gather_rows, gather_rows_reference])
def test_a_token_without_a_segment_is_refused(gather: Callable, token: int) -> None:
    table = store([2, 1], 4, 1, 8, torch.float32)
    tokens = torch.tensor([[[0]], [[token - 4]]])
    with pytest.raises(ValueError, match="segment"):
        gather(table, 0, tokens, torch.zeros_like(tokens), poisoned(2, 1, 3, 2, 8, dtype=torch.float32))


def test_a_slot_outside_the_result_is_refused() -> None:
    table = store([1], 4, 1, 8, torch.float32)
    for slot in (3, -1):
        with pytest.raises(ValueError, match="slot beyond the 3 of out"):
            gather_rows(
                table, 0, torch.tensor([[[1]]]), torch.tensor([[[slot]]]), poisoned(1, 1, 3, 2, 8, dtype=torch.float32)
            )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer": LAYERS}, "layer=3 is not one of the table's 3 layers"),
        ({"layer": -1}, "layer=-1"),
        ({"tokens": torch.zeros(1, 2, 3, dtype=torch.int32)}, "tokens .* must be int64"),
        ({"tokens": torch.zeros(1, 1, 3, dtype=torch.int64)}, r"tokens .* must be int64 \[1, 2, K\]"),
        ({"slots": torch.zeros(1, 2, 4, dtype=torch.int64)}, "must have one shape"),
        ({"out": torch.zeros(1, 2, 3, 2, 8, dtype=torch.float16)}, "the rows need torch.float16"),
        ({"out": torch.zeros(1, 2, 3, 2, 4)}, "the rows need"),
        ({"out": torch.zeros(1, 2, 3, 8, 2).mT}, "contiguous rows"),
        ({"out": torch.zeros(1, 2, 3, 16)}, "must be"),
        ({"counts": torch.zeros(1, 2, dtype=torch.int64)}, r"counts .* must be int32 \(1, 2\)"),
        ({"timer": torch.zeros(2, dtype=torch.int64)}, "timer .* must be int64"),
        ({"table": SegmentTable([[]], torch.zeros(2, 1, dtype=torch.int64), 4)}, "the table has 1 sequences"),
        ({"table": SegmentTable([[]], torch.zeros(1, 1, dtype=torch.int32), 4)}, "addresses must be int64"),
    ],
)
def test_wrong_arguments_are_named(change: dict, message: str) -> None:
    arguments = {
        "table": store([1], 4, 2, 8, torch.float32),
        "layer": 0,
        "tokens": torch.zeros(1, 2, 3, dtype=torch.int64),
        "slots": torch.arange(3).expand(1, 2, 3),
        "out": torch.zeros(1, 2, 3, 2, 8),
    }
    gather_rows(**arguments)
    with pytest.raises(ValueError, match=message):
        gather_rows(**(arguments | change))


def test_a_segment_must_be_aligned() -> None:
    segment = torch.zeros(LAYERS * 64 + 1)[1:].view(LAYERS, 1, 4, 2, 8)
    table = SegmentTable([[segment]], torch.tensor([[segment.data_ptr()]]), 4)
    tokens = torch.zeros(1, 1, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="multiple of 16 bytes"):
        gather_rows(table, 0, tokens, tokens, torch.zeros(1, 1, 1, 2, 8))


@pytest.mark.parametrize("gather", [gather_rows, gather_rows_reference])
def test_entries_behind_the_counts_are_not_looked_at(gather: Callable) -> None:
    table = store([3, 1], 9, 3, 8, torch.float32)
    tokens, slots = choose(table, 3, 9, 12)
    counts = torch.tensor([[0, 4, 9], [1, 8, 2]], dtype=torch.int32)
    expected = poisoned(2, 3, 12, 2, 8, dtype=torch.float32)
    out = expected.clone()
    behind = torch.arange(9) >= counts[..., None]
    naive(table, 1, tokens.masked_fill(behind, -1), slots, expected)
    gather(table, 1, tokens.masked_fill(behind, 10**9), slots.masked_fill(behind, -(10**9)), out, counts)
    assert_same_bits(out, expected)


@pytest.mark.parametrize("pairs", [1, 3, 32, 64, 65, 500])
@pytest.mark.parametrize("kept", [1, 100, 4096])
@pytest.mark.parametrize("row_bytes", [4, 20, 512, 2048, 1 << 17])
def test_launch_covers_every_row_with_few_programs(pairs: int, kept: int, row_bytes: int) -> None:
    launch = gather_launch(pairs, kept, row_bytes)
    assert 1 <= launch.programs <= min(64, pairs * kept)
    assert launch.tile_rows & (launch.tile_rows - 1) == 0


def test_triton_kernel_in_the_interpreter(interpret: Callable[[str], None]) -> None:
    interpret("interpreted_gather.py")


@pytest.mark.gpu
@pytest.mark.parametrize("where", ["pinned", "device"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("segments", "size", "kv_heads", "dim", "kept", "capacity"), CASES)
def test_cuda(
    where: str, dtype: torch.dtype, segments: list[int], size: int, kv_heads: int, dim: int, kept: int, capacity: int
) -> None:
    table = store(segments, size, kv_heads, dim, dtype, device="cuda", where=where)
    tokens, slots = choose(table, kv_heads, kept, capacity)
    out = poisoned(len(segments), kv_heads, capacity, 2, dim, dtype=dtype)
    expected = out.clone()
    naive(table, 1, tokens, slots, expected)
    out, tokens, slots = out.cuda(), tokens.cuda(), slots.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        gather_rows(table, 1, tokens, slots, out)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same_bits(out, expected)


@pytest.mark.gpu
def test_cuda_many_rows_into_a_strided_result_and_no_rows() -> None:
    table = store([9, 5], 1000, 4, 128, torch.bfloat16, device="cuda", where="pinned")
    tokens, slots = choose(table, 4, 3000, 3500)
    buffer = poisoned(2, 4, 4000, 2, 128, dtype=torch.bfloat16).cuda()
    expected = buffer.cpu()
    gather_rows_reference(
        SegmentTable(table.tensors, table.addresses.cpu(), 1000), 2, tokens, slots, expected[:, :, 100:3600]
    )
    gather_rows(table, 2, tokens.cuda(), slots.cuda(), buffer[:, :, 100:3600])
    assert_same_bits(buffer, expected)
    none = torch.zeros(2, 4, 0, dtype=torch.int64, device="cuda")
    gather_rows(table, 2, none, none, buffer)
    assert_same_bits(buffer, expected)


@pytest.mark.gpu
def test_cuda_counts_and_time() -> None:
    table = store([9, 5], 1000, 4, 128, torch.bfloat16, device="cuda", where="pinned")
    tokens, slots = choose(table, 4, 3000, 3500)
    counts = torch.tensor([[0, 1, 2999, 3000], [33, 32, 31, 1000]], dtype=torch.int32)
    expected = poisoned(2, 4, 3500, 2, 128, dtype=torch.bfloat16)
    out = expected.cuda()
    behind = torch.arange(3000) >= counts[..., None]
    on_cpu = SegmentTable(table.tensors, table.addresses.cpu(), 1000)
    gather_rows_reference(on_cpu, 2, tokens.masked_fill(behind, -1), slots, expected)
    never = torch.tensor([2**62, 0])
    timer = never.cuda()
    listed = tokens.masked_fill(behind, 10**9).cuda(), slots.cuda()
    gather_rows(table, 2, *listed, out, torch.zeros_like(counts).cuda(), timer)
    assert torch.equal(timer.cpu(), never) and out.isnan().all()
    gather_rows(table, 2, *listed, out, counts.cuda(), timer)
    assert_same_bits(out, expected)
    start, end = timer.tolist()
    # 3.6 MB: 70 us at the speed of a PCIe 5 x16 link.
    assert 10_000 < end - start < 10_000_000


@pytest.mark.gpu
def test_cuda_skips_what_has_no_segment_or_slot() -> None:
    table = store([2, 1], 4, 1, 8, torch.float32, device="cuda", where="pinned")
    tokens = torch.tensor([[[0, 8, 12, 10**6, 2**40, 3]], [[4, 0, 1, 2, 3, -5]]])
    slots = torch.tensor([[[0, 1, 2, 3, 4, 5]], [[0, 6, -1, 2**33, 1, 2]]])
    out = poisoned(2, 1, 6, 2, 8, dtype=torch.float32)
    expected = out.clone()
    for b, i in ((0, 0), (0, 5), (1, 4)):
        expected[b, 0, slots[b, 0, i]] = table.tensors[b][0][0, 0, tokens[b, 0, i]]
    assert_same_bits(gather_rows(table, 0, tokens.cuda(), slots.cuda(), out.cuda()), expected)


@pytest.mark.gpu
def test_cuda_rows_beyond_2_to_31_bytes_of_a_segment() -> None:
    size, dim = 2**22 + 3, 128
    needed = LAYERS * size * 2 * dim * 2 + 2**28
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.1f} GiB of free GPU memory")
    segment = torch.zeros(LAYERS, 1, size, 2, dim, dtype=torch.float16, device="cuda")
    table = SegmentTable([[segment]], torch.tensor([[segment.data_ptr()]], device="cuda"), size)
    tokens = torch.tensor([[[0, 12345, size - 1]]], device="cuda")
    wanted = torch.randn(3, 2, dim, generator=torch.Generator().manual_seed(0)).half().cuda()
    segment[2, 0, tokens[0, 0]] = wanted
    slots = torch.tensor([[[2, 0, 1]]], device="cuda")
    out = gather_rows(table, 2, tokens, slots, torch.zeros(1, 1, 3, 2, dim, dtype=torch.float16, device="cuda"))
    assert_same_bits(out[0, 0][slots[0, 0]], wanted)


@pytest.mark.gpu
def test_cuda_graph_reads_the_tokens_it_is_replayed_with() -> None:
    table = store([2], 64, 2, 64, torch.bfloat16, device="cuda", where="pinned")
    tokens, slots = (value.cuda() for value in choose(table, 2, 30, 40))
    out = poisoned(1, 2, 40, 2, 64, dtype=torch.bfloat16).cuda()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        gather_rows(table, 1, tokens, slots, out)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gather_rows(table, 1, tokens, slots, out)
    for seed in (1, 2):
        new_tokens, new_slots = choose(table, 2, 30, 40, seed)
        tokens.copy_(new_tokens)
        slots.copy_(new_slots)
        out.fill_(torch.nan)
        expected = out.cpu()
        naive(table, 1, new_tokens, new_slots, expected)
        graph.replay()
        assert_same_bits(out, expected)
