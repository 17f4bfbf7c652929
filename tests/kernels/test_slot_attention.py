"""Attention over slots against softmax attention in float64, head by head."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from ds_offload.kernels.segment_table import SegmentTable
from ds_offload.kernels.slot_attention import slot_attention, slot_attention_reference
from ds_offload.kernels.slot_attention_launch import StoredRows, slot_attention_launch

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
# By the coarser dtype of query and rows, for results of order 1.
TOLERANCE = {F32: {"rtol": 1e-5, "atol": 1e-5}, F16: {"rtol": 2e-3, "atol": 2e-3}, BF16: {"rtol": 1.6e-2, "atol": 2e-2}}
DTYPES = [(F32, F32), (F16, F16), (BF16, BF16), (F32, BF16), (BF16, F32)]
HEADS = [(4, 4), (6, 2), (8, 1)]
DIMS = [16, 64, 80, 128, 256]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SCALING = 0.2


def case(
    heads: int,
    kv_heads: int,
    dim: int,
    count: int,
    query_dtype: torch.dtype = F32,
    rows_dtype: torch.dtype = F32,
    device: str = "cpu",
    seed: int = 0,
    sequences: int = 3,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sequences with NaN in the rows that no slot names, and about a third of the list -1."""
    generator = torch.Generator().manual_seed(seed)
    capacity = count + 5
    query = torch.randn(sequences, heads, dim, generator=generator).to(query_dtype)
    rows = torch.randn(sequences, kv_heads, capacity, 2, dim, generator=generator).to(rows_dtype)
    slots = torch.rand(sequences, kv_heads, capacity, generator=generator).argsort(-1)[..., :count]
    skipped = torch.rand(slots.shape, generator=generator) < 0.3
    skipped[..., count // 2] = False
    slots = slots.masked_fill(skipped, -1)
    named = torch.zeros(sequences, kv_heads, capacity + 1, dtype=torch.bool).scatter_(-1, slots % (capacity + 1), True)
    rows = rows.masked_fill(~named[..., :capacity, None, None], torch.nan)
    return query.to(device), rows.to(device), slots.to(device)


def naive(query: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    dtype, group = query.dtype, query.shape[1] // rows.shape[1]
    query, rows, slots = query.cpu(), rows.cpu(), slots.cpu()
    out = torch.empty(query.shape, dtype=torch.float64)
    for b in range(query.shape[0]):
        for head in range(query.shape[1]):
            listed = slots[b, head // group]
            keys, values = rows[b, head // group, listed[listed >= 0]].double().unbind(1)
            out[b, head] = (SCALING * (keys @ query[b, head].double())).softmax(0) @ values
    return out.to(dtype)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, *dtypes: torch.dtype) -> None:
    coarsest = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    torch.testing.assert_close(actual.cpu(), expected, **TOLERANCE[coarsest])


@pytest.mark.parametrize("attend", [slot_attention, slot_attention_reference])
@pytest.mark.parametrize(("query_dtype", "rows_dtype"), DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("dim", DIMS)
def test_attention(
    attend: Callable, query_dtype: torch.dtype, rows_dtype: torch.dtype, heads: int, kv_heads: int, dim: int
) -> None:
    for count in (1, 7, 64, 257):
        args = case(heads, kv_heads, dim, count, query_dtype, rows_dtype)
        out = torch.full_like(args[0], torch.nan)
        assert attend(*args, SCALING, out=out) is out
        assert_close(out, naive(*args), query_dtype, rows_dtype)
        assert torch.equal(attend(*args, SCALING), out)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(1, 1, 17), (2, 2, 65), (34, 2, 96), (71, 1, 64)])
def test_odd_head_dims_and_large_groups(dtype: torch.dtype, heads: int, kv_heads: int, dim: int, device: str) -> None:
    args = case(heads, kv_heads, dim, 140, dtype, dtype, device)
    assert_close(slot_attention(*args, SCALING), naive(*args), dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_same_bits_wherever_rows_stand(dtype: torch.dtype, heads: int, kv_heads: int, device: str) -> None:
    query, rows, slots = case(heads, kv_heads, 64, 300, dtype, dtype, device)
    out = slot_attention(query, rows, slots, SCALING)
    order = torch.randperm(rows.shape[2]).to(device)
    moved = torch.where(slots >= 0, order.argsort()[slots], -1)
    assert torch.equal(slot_attention(query, rows[:, :, order], moved, SCALING), out)
    buffer = torch.full((3, kv_heads + 1, 900, 2, 64), torch.nan, dtype=dtype, device=device)
    view = buffer[:, 1:, 7 : 7 + rows.shape[2]]
    view.copy_(rows)
    assert torch.equal(slot_attention(query, view, slots, SCALING), out)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_same_bits_in_every_batch(dtype: torch.dtype, heads: int, kv_heads: int, device: str) -> None:
    query, rows, slots = case(heads, kv_heads, 80, 300, dtype, dtype, device)
    slots[1, :, 160:] = -1
    together = slot_attention(query, rows, slots, SCALING)
    for b in range(3):
        one = slice(b, b + 1)
        assert torch.equal(slot_attention(query[one], rows[one], slots[one], SCALING)[0], together[b])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("stride", ["slots", "heads swapped", "broadcast"])
def test_strided_rows(stride: str, device: str) -> None:
    query, rows, slots = case(4, 2, 20, 40, F16, F16, device)
    if stride == "slots":
        slots = torch.where(slots >= 0, slots // 2, -1)
        rows = rows[:, :, ::2].nan_to_num(1.0).repeat_interleave(2, 2)[:, :, ::2]
    elif stride == "heads swapped":
        rows = rows.transpose(1, 2).contiguous().transpose(1, 2)
    else:
        slots = slots[:1].expand(3, -1, -1)
        rows = rows[:1].expand(3, -1, -1, -1, -1)
    assert not rows.is_contiguous()
    assert_close(slot_attention(query, rows, slots, SCALING), naive(query, rows, slots), F16)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_rows_of_a_store_give_the_bits_of_the_same_rows_in_a_tensor(
    dtype: torch.dtype, heads: int, kv_heads: int, device: str
) -> None:
    query, rows, slots = case(heads, kv_heads, 80, 300, dtype, dtype, device)
    size = 64
    padded = torch.nn.functional.pad(rows, (0, 0, 0, 0, 0, -rows.shape[2] % size))
    segments = [[part.expand(2, *part.shape).clone() for part in one.split(size, 1)] for one in padded]
    addresses = torch.tensor([[segment.data_ptr() for segment in one] for one in segments], device=device)
    stored = StoredRows(SegmentTable(segments, addresses, size), 1, kv_heads, 80, dtype)
    assert torch.equal(slot_attention(query, stored, slots, SCALING), slot_attention(query, rows, slots, SCALING))
    assert_close(slot_attention_reference(query, stored, slots, SCALING), naive(query, rows, slots), dtype)


@pytest.mark.parametrize("device", DEVICES)
def test_no_sequences(device: str) -> None:
    query, rows, slots = case(4, 2, 16, 3, device=device)
    assert slot_attention(query[:0], rows[:0], slots[:0], SCALING).shape == (0, 4, 16)


@pytest.mark.parametrize("attend", [slot_attention, slot_attention_reference])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(1, 4, 16, dtype=torch.float64)}, "query .* must be float"),
        ({"query": torch.zeros(1, 16, 4).mT}, "contiguous"),
        ({"query": torch.zeros(1, 3, 16)}, "3 query heads must be a multiple"),
        ({"query": torch.zeros(2, 4, 16)}, r"rows .* must be float \[2, Hkv"),
        ({"rows": torch.zeros(1, 2, 9, 2, 8)}, "rows .* must be float"),
        ({"rows": torch.zeros(1, 2, 9, 2, 16, dtype=torch.int8)}, "rows .* must be float"),
        ({"rows": torch.zeros(1, 2, 2, 9, 16).transpose(2, 3)}, "side by side"),
        ({"slots": torch.zeros(1, 2, 3, dtype=torch.int32)}, "slots .* must be int64"),
        ({"slots": torch.zeros(1, 4, 3, dtype=torch.int64)}, "slots .* must be int64"),
        ({"slots": torch.zeros(1, 2, 0, dtype=torch.int64)}, "P >= 1"),
        ({"slots": torch.tensor([[[0], [9]]])}, "slot 9 is beyond the 9 rows"),
        ({"slots": torch.tensor([[[0, -1], [-1, -1]]])}, "name no row"),
        ({"out": torch.zeros(1, 4, 16, dtype=F16)}, "out .* must be torch.float32"),
        ({"out": torch.zeros(1, 16, 4).mT}, "contiguous"),
    ],
)
def test_wrong_arguments_are_named(attend: Callable, change: dict, message: str) -> None:
    arguments = {
        "query": torch.zeros(1, 4, 16),
        "rows": torch.zeros(1, 2, 9, 2, 16),
        "slots": torch.tensor([[[0, 8], [-1, 3]]]),
        "scaling": 1.0,
    }
    attend(**arguments)
    with pytest.raises(ValueError, match=message):
        attend(**(arguments | change))


@pytest.mark.parametrize("group", [1, 2, 3, 8, 16, 17, 71])
@pytest.mark.parametrize("dim", [16, 80, 128, 256])
@pytest.mark.parametrize(("query_dtype", "rows_dtype"), DTYPES)
def test_launch_fits_the_kernels(group: int, dim: int, query_dtype: torch.dtype, rows_dtype: torch.dtype) -> None:
    launch = slot_attention_launch(group, dim, query_dtype, rows_dtype)
    assert launch.split % launch.tile == 0 and launch.tile & (launch.tile - 1) == 0
    if launch.tensor_cores:
        assert query_dtype == rows_dtype != F32 and launch.heads >= 16 and launch.tile >= 16
    else:
        assert launch.heads == 1


def test_triton_kernels_in_the_interpreter(interpret: Callable[[str], None]) -> None:
    interpret("interpreted_slot_attention.py")


@pytest.mark.gpu
@pytest.mark.parametrize(("query_dtype", "rows_dtype"), DTYPES)
@pytest.mark.parametrize("dim", DIMS)
def test_cuda(query_dtype: torch.dtype, rows_dtype: torch.dtype, dim: int) -> None:
    # Outside the tensor cores a group is so many programs: one layout stands for all.
    for heads, kv_heads in HEADS if query_dtype == rows_dtype != F32 else HEADS[1:2]:
        for count in (1, 7, 64, 257):
            args = case(heads, kv_heads, dim, count, query_dtype, rows_dtype, "cuda")
            out = torch.full_like(args[0], torch.nan)
            assert slot_attention(*args, SCALING, out=out) is out
            assert_close(out, naive(*args), query_dtype, rows_dtype)
            assert torch.equal(slot_attention(*args, SCALING), out)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize(("heads", "kv_heads", "count"), [(32, 32, 8192), (32, 8, 8260), (8, 1, 20000), (4, 4, 70000)])
def test_cuda_full_size(heads: int, kv_heads: int, count: int, dtype: torch.dtype) -> None:
    query, rows, slots = case(heads, kv_heads, 128, count, dtype, dtype, "cuda", sequences=2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = slot_attention(query, rows, slots, SCALING)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_close(out, naive(query, rows, slots), dtype)
    for b in range(2):
        one = slice(b, b + 1)
        assert torch.equal(slot_attention(query[one], rows[one], slots[one], SCALING)[0], out[b])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_cuda_same_bits_however_far_the_list_is_padded(dtype: torch.dtype, heads: int, kv_heads: int) -> None:
    query, rows, slots = case(heads, kv_heads, 128, 700, dtype, dtype, "cuda")
    out = slot_attention(query, rows, slots, SCALING)
    for more in (1, 500, 20000):
        padded = torch.cat((slots, slots.new_full((3, kv_heads, more), -1)), -1)
        assert torch.equal(slot_attention(query, rows, padded, SCALING), out)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [1, 4])
def test_cuda_rows_beyond_2_to_31_elements(heads: int) -> None:
    capacity, dim = 2**23 + 5, 128
    needed = 2 * capacity * 2 * dim * 2 + 2**28
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.1f} GiB of free GPU memory")
    rows = torch.zeros(2, 1, capacity, 2, dim, dtype=F16, device="cuda")
    slots = torch.tensor([[[0, capacity - 1, -1, 12345, capacity - 2]]] * 2, device="cuda")
    query = torch.randn(2, heads, dim).half().cuda()
    for b in range(2):
        rows[b, 0, slots[b, 0, slots[b, 0] >= 0]] = torch.randn(4, 2, dim).half().cuda()
    small = torch.stack([rows[b, :, slots[b, 0].clamp(min=0)] for b in range(2)])
    expected = naive(query, small, torch.tensor([[[0, 1, -1, 3, 4]]] * 2))
    assert_close(slot_attention(query, rows, slots, SCALING), expected, F16)


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_cuda_graph_reads_the_slots_it_is_replayed_with(heads: int, kv_heads: int) -> None:
    query, rows, slots = case(heads, kv_heads, 64, 500, BF16, BF16, "cuda")
    rows = rows.nan_to_num(1.0)
    out = torch.empty_like(query)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        slot_attention(query, rows, slots, SCALING, out=out)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        slot_attention(query, rows, slots, SCALING, out=out)
    for seed in (1, 2):
        slots.copy_(case(heads, kv_heads, 64, 500, seed=seed)[2])
        slots[:, :, 3 * seed : 100 * seed] = -1
        query.mul_(-0.5)
        out.fill_(torch.nan)
        graph.replay()
        assert_close(out, naive(query, rows, slots), BF16)
