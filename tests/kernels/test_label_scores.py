"""Label scores against a product in float64 over decoded labels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from label_cases import Case, exact_scores, kept_query, label_case, to_cuda

from ds_offload.kernels import label_scores_cpu
from ds_offload.kernels.label_codec import LabelLayout, decode_labels
from ds_offload.kernels.label_scores import label_scores, label_scores_reference
from ds_offload.kernels.label_scores_inputs import ScoreInputs
from ds_offload.kernels.label_scores_launch import scores_launch

BITS = (16, 8, 4, 2)
CODED = (8, 4, 2)


def tolerance(bits: int) -> dict[str, float]:
    """Of scores of order 1: float32 sums in any order at 16 bits, else exact sums and the rounding of scales."""
    return {"rtol": 1e-4, "atol": 2e-5} if bits == 16 else {"rtol": 2e-6, "atol": 1e-12}


def poisoned(query: torch.Tensor, max_length: int) -> torch.Tensor:
    return torch.full((*query.shape[:2], max_length), torch.nan, device=query.device)


def only(case: Case, b: int) -> Case:
    """Sequence b of a case by itself."""
    labels, layout, query, channels, starts, lengths = case
    return labels, layout, query[b : b + 1], channels, starts[b : b + 1], lengths[b : b + 1]


@pytest.mark.parametrize("score", [label_scores, label_scores_reference])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("channels", "kv_heads", "group", "lengths"),
    [
        (28, 3, 3, [1000, 1, 0, 513]),
        (1, 1, 1, [7]),
        (13, 2, 1, [64, 65]),
        (44, 1, 2, [70]),
        (60, 2, 8, [129]),
        (128, 1, 5, [33, 2]),
    ],
)
def test_scores(score: Callable, bits: int, channels: int, kv_heads: int, group: int, lengths: list[int]) -> None:
    case = label_case(channels, bits, kv_heads, group, lengths)
    for max_length in (max(lengths), max(lengths) + 100):
        out = poisoned(case[2], max_length)
        assert score(*case, max_length, 0.3, out=out) is out
        torch.testing.assert_close(out.double(), exact_scores(case, max_length, 0.3), **tolerance(bits))
        assert torch.equal(score(*case, max_length, 0.3), out)


@pytest.mark.parametrize("bits", CODED)
def test_the_rounded_query_is_within_half_a_step_of_the_query(bits: int) -> None:
    case = label_case(28, bits, 2, 3, [200])
    labels, layout, *_ = case
    sums = decode_labels(labels, layout).abs().sum(-1)[:, 3:203]
    difference = (label_scores(*case, 200, 1.0) - exact_scores(case, 200, 1.0, rounded=False)).abs()
    for head in range(6):
        half_step = kept_query(case, 0, head).abs().max() / 254
        assert (difference[0, head] <= half_step * sums[head // 3] * 1.0001).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("score", [label_scores, label_scores_reference])
def test_queries_of_zeros_and_of_extreme_sizes(score: Callable, bits: int) -> None:
    labels, layout, query, *others = label_case(9, bits, 1, 3, [40])
    query = query * torch.tensor([0.0, 1e-25, 1e25])[:, None]
    scores = score(labels, layout, query, *others, 40, 1.0)
    assert (scores[0, 0] == 0).all()
    expected = exact_scores((labels, layout, query, *others), 40, 1.0)
    torch.testing.assert_close(scores[0, 1:].double(), expected[0, 1:], rtol=1e-4, atol=1e-30)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_sequence_scores_the_same_in_every_batch(bits: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = label_case(28, bits, 2, 3, [700, 1, 1100])
    alone = [label_scores(*only(case, b), 1100, 0.3)[0] for b in range(3)]
    monkeypatch.setattr(label_scores_cpu, "LOOKUPS_PER_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    together = label_scores(*case, 1200, 0.3)
    for b in range(3):
        assert torch.equal(together[b, :, :1100], alone[b])


@pytest.mark.parametrize("bits", BITS)
def test_strided_labels_and_queries(bits: int) -> None:
    labels, layout, query, *others = label_case(12, bits, 2, 2, [50, 31])
    cache = torch.zeros(2, 2, labels.shape[1] + 9, layout.row_bytes, dtype=torch.uint8)
    cache[1, :, : labels.shape[1]] = labels
    wide = torch.zeros(4, 2, 34)
    wide[..., ::2] = query.transpose(0, 1)
    out = label_scores(cache[1], layout, wide[..., ::2].transpose(0, 1), *others, 50, 0.3)
    assert torch.equal(out, label_scores(labels, layout, query, *others, 50, 0.3))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_queries_of_every_float_dtype_are_taken_as_float32(bits: int, dtype: torch.dtype) -> None:
    labels, layout, query, *others = label_case(12, bits, 2, 2, [50])
    query = query.to(dtype)
    out = label_scores(labels, layout, query, *others, 50, 0.3)
    assert torch.equal(out, label_scores(labels, layout, query.float(), *others, 50, 0.3))


@pytest.mark.parametrize("bits", BITS)
def test_nothing_to_score(bits: int) -> None:
    labels, layout, query, channels, starts, lengths = label_case(4, bits, 2, 2, [5])
    assert label_scores(labels, layout, query, channels, starts, lengths * 0, 0, 1.0).shape == (1, 4, 0)
    assert label_scores(labels, layout, query[:0], channels, starts[:0], lengths[:0], 5, 1.0).shape == (0, 4, 5)
    assert (label_scores(labels, layout, query, channels, starts, lengths * 0, 3, 1.0) == -torch.inf).all()


@pytest.mark.parametrize("score", [label_scores, label_scores_reference])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.zeros(2, 9, 5, dtype=torch.uint8)}, r"labels .* must be uint8 \[Hkv, N, 4\]"),
        ({"query": torch.zeros(4, 6)}, "query .* must be floating point"),
        ({"query": torch.zeros(1, 3, 6)}, "3 query heads must be a multiple"),
        ({"query": torch.zeros(1, 4, 6, dtype=torch.int64)}, "query .* must be floating point"),
        ({"channels": torch.zeros(2, 5, dtype=torch.int64)}, r"channels .* must be int64 \(2, 4\)"),
        ({"channels": torch.zeros(2, 4, dtype=torch.int32)}, "channels .* must be int64"),
        ({"lengths": torch.tensor([5], dtype=torch.int32)}, "lengths .* must be int64"),
        ({"starts": torch.tensor([0, 0])}, "starts .* must be int64"),
        ({"max_length": -1}, "max_length=-1 must not be negative"),
        ({"max_length": 4}, "sequence 0: rows 0 to 5 do not fit"),
        ({"starts": torch.tensor([5])}, "sequence 0: rows 5 to 10 do not fit the cache's 9 rows"),
        ({"starts": torch.tensor([-1])}, "do not fit"),
        ({"out": torch.zeros(1, 4, 6)}, "out .* must be float32"),
        ({"out": torch.zeros(1, 5, 4).mT}, "contiguous"),
    ],
)
def test_wrong_arguments_are_named(score: Callable, change: dict, message: str) -> None:
    arguments = {
        "labels": torch.zeros(2, 9, 4, dtype=torch.uint8),
        "layout": LabelLayout(4, 2),
        "query": torch.zeros(1, 4, 6),
        "channels": torch.zeros(2, 4, dtype=torch.int64),
        "starts": torch.tensor([0]),
        "lengths": torch.tensor([5]),
        "max_length": 5,
        "scaling": 1.0,
    }
    score(**arguments)
    with pytest.raises(ValueError, match=message):
        score(**(arguments | change))


def test_labels_that_kernels_cannot_read_in_vectors_are_named() -> None:
    labels, layout, *others = label_case(28, 2, 2, 1, [20])
    ScoreInputs(labels, layout, *others, 20, 1.0).check_alignment()
    apart = torch.zeros(2, 50, layout.row_bytes, dtype=torch.uint8)[:, ::2]
    with pytest.raises(ValueError, match="side by side"):
        ScoreInputs(apart, layout, *others, 20, 1.0).check_alignment()
    odd = torch.zeros(2 * 25 * layout.row_bytes + 4, dtype=torch.uint8)[4:].view(2, 25, layout.row_bytes)
    with pytest.raises(ValueError, match="multiple of 8 bytes"):
        ScoreInputs(odd, layout, *others, 20, 1.0).check_alignment()


@pytest.mark.parametrize("group", [1, 3, 4, 7, 8, 12, 64, 71])
@pytest.mark.parametrize(("channels", "bits"), [(28, 2), (44, 2), (60, 2), (1, 16), (128, 8), (256, 16)])
def test_launch_fits_the_kernels(channels: int, bits: int, group: int) -> None:
    layout = LabelLayout(channels, bits)
    launch = scores_launch(layout, group)
    assert group % launch.heads == 0 and launch.heads <= 8
    for value in (launch.block, launch.part, launch.vector):
        assert value & (value - 1) == 0
    assert layout.row_bytes % (4 * launch.vector) == 0 and launch.vector <= 4
    assert launch.block == 4 * launch.part and 32 <= launch.part <= 256


def test_triton_kernels_in_the_interpreter(interpret: Callable[[str], None]) -> None:
    interpret("interpreted_label_scores.py")


@pytest.mark.gpu
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("channels", "kv_heads", "group", "lengths"),
    [
        (28, 3, 3, [5000, 1, 0, 513]),
        (1, 1, 1, [7]),
        (13, 2, 1, [64, 65]),
        (44, 2, 1, [3001]),
        (60, 8, 4, [1290, 3]),
        (60, 2, 8, [129]),
        (128, 1, 12, [333, 2]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda(bits: int, channels: int, kv_heads: int, group: int, lengths: list[int], dtype: torch.dtype) -> None:
    labels, layout, query, *others = label_case(channels, bits, kv_heads, group, lengths)
    case = (labels, layout, query.to(dtype), *others)
    on_device = to_cuda(case)
    max_length = max(lengths) + 77
    out = poisoned(on_device[2], max_length).float()
    torch.cuda.set_sync_debug_mode("error")
    try:
        label_scores(*on_device, max_length, 0.3, out=out)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(out.cpu().double(), exact_scores(case, max_length, 0.3), **tolerance(bits))
    torch.testing.assert_close(out.cpu(), label_scores(*case, max_length, 0.3), **tolerance(bits))
    for b, length in enumerate(lengths):
        alone = label_scores(*only(on_device, b), length, 0.3)
        assert torch.equal(alone[0], out[b, :, :length])


@pytest.mark.gpu
def test_cuda_labels_beyond_2_to_31_bytes() -> None:
    layout = LabelLayout(28, 2)
    capacity = 2**28 + 4099
    needed = 2 * capacity * layout.row_bytes + 2**28
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.1f} GiB of free GPU memory")
    labels = torch.zeros(2, capacity, layout.row_bytes, dtype=torch.uint8, device="cuda")
    small, _, query, channels, _, _ = label_case(28, 2, 2, 3, [4000])
    length = 4000
    labels[:, capacity - length :] = small[:, :length].cuda()
    starts, lengths = torch.tensor([capacity - length]), torch.tensor([length])
    out = label_scores(labels, layout, query.cuda(), channels.cuda(), starts.cuda(), lengths.cuda(), length, 0.3)
    expected = exact_scores((small, layout, query, channels, torch.tensor([0]), lengths), length, 0.3)
    torch.testing.assert_close(out.cpu().double(), expected, **tolerance(2))


@pytest.mark.gpu
def test_cuda_graph_follows_the_lengths_and_queries_it_is_replayed_with() -> None:
    case = label_case(28, 2, 3, 3, [900, 40])
    on_device = to_cuda(case)
    query, lengths = on_device[2], on_device[5]
    out = poisoned(query, 1000)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        label_scores(*on_device, 1000, 0.3, out=out)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        label_scores(*on_device, 1000, 0.3, out=out)
    for kept in ([3, 40], [900, 0]):
        lengths.copy_(torch.tensor(kept))
        query.mul_(-0.5)
        out.fill_(torch.nan)
        graph.replay()
        replayed = (*case[:2], query.cpu(), *case[3:5], torch.tensor(kept))
        torch.testing.assert_close(out.cpu().double(), exact_scores(replayed, 1000, 0.3), **tolerance(2))
