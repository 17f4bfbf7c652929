"""Label scores against a product in float64 over decoded labels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from ds_offload.kernels import label_scores_cpu
from ds_offload.kernels.label_codec import LabelLayout, decode_labels, encode_labels
from ds_offload.kernels.label_scores import label_scores, label_scores_reference, scores_launch

BITS = (16, 8, 4, 2)
# Of scores of order 1: sums of float32 in different orders.
TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}


def case(channels: int, bits: int, kv_heads: int, group: int, lengths: list[int], seed: int = 0):
    """Labels of sequences one after the other, three rows apart, and a query for each."""
    generator = torch.Generator().manual_seed(seed)
    layout = LabelLayout(channels, bits)
    starts = [3 + sum(lengths[:n]) + 3 * n for n in range(len(lengths))]
    capacity = starts[-1] + lengths[-1] + 2
    labels = encode_labels(torch.randn(kv_heads, capacity, channels, generator=generator), layout)
    query = torch.randn(len(lengths), kv_heads * group, channels, generator=generator)
    return labels, layout, query, torch.tensor(starts), torch.tensor(lengths)


def naive(labels, layout, query, starts, lengths, max_length: int, scaling: float) -> torch.Tensor:
    keys = decode_labels(labels, layout).double()
    group = query.shape[1] // labels.shape[0]
    out = torch.full((*query.shape[:2], max_length), -torch.inf, dtype=torch.float64)
    for b, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        for head in range(query.shape[1]):
            out[b, head, :length] = keys[head // group, start : start + length] @ query[b, head].double() * scaling
    return out.float()


def poisoned(query: torch.Tensor, max_length: int) -> torch.Tensor:
    return torch.full((*query.shape[:2], max_length), torch.nan, device=query.device)


@pytest.mark.parametrize("score", [label_scores, label_scores_reference])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("channels", "kv_heads", "group", "lengths"),
    [
        (28, 3, 3, [1000, 1, 0, 513]),
        (1, 1, 1, [7]),
        (13, 2, 1, [64, 65]),
        (60, 2, 8, [129]),
        (128, 1, 5, [33, 2]),
    ],
)
def test_scores(score: Callable, bits: int, channels: int, kv_heads: int, group: int, lengths: list[int]) -> None:
    args = case(channels, bits, kv_heads, group, lengths)
    for max_length in (max(lengths), max(lengths) + 100):
        out = poisoned(args[2], max_length)
        assert score(*args, max_length, 0.3, out=out) is out
        torch.testing.assert_close(out, naive(*args, max_length, 0.3), **TOLERANCE)
        assert torch.equal(score(*args, max_length, 0.3), out)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_sequence_scores_the_same_in_every_batch(bits: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    labels, layout, query, starts, lengths = case(28, bits, 2, 3, [700, 1, 1100])
    alone = [
        label_scores(labels, layout, query[b : b + 1], starts[b : b + 1], lengths[b : b + 1], 1100, 0.3)[0]
        for b in range(3)
    ]
    monkeypatch.setattr(label_scores_cpu, "LOOKUPS_PER_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    together = label_scores(labels, layout, query, starts, lengths, 1200, 0.3)
    for b in range(3):
        assert torch.equal(together[b, :, :1100], alone[b])


@pytest.mark.parametrize("bits", BITS)
def test_strided_labels_and_queries(bits: int) -> None:
    labels, layout, query, starts, lengths = case(12, bits, 2, 2, [50, 31])
    cache = torch.zeros(2, 2, labels.shape[1] + 9, layout.row_bytes, dtype=torch.uint8)
    cache[1, :, : labels.shape[1]] = labels
    wide = torch.zeros(2, 4, 24)
    wide[..., ::2] = query
    out = label_scores(cache[1], layout, wide[..., ::2], starts, lengths, 50, 0.3)
    assert torch.equal(out, label_scores(labels, layout, query, starts, lengths, 50, 0.3))


@pytest.mark.parametrize("bits", BITS)
def test_nothing_to_score(bits: int) -> None:
    labels, layout, query, starts, lengths = case(4, bits, 2, 2, [5])
    assert label_scores(labels, layout, query, starts, lengths * 0, 0, 1.0).shape == (1, 4, 0)
    assert label_scores(labels, layout, query[:0], starts[:0], lengths[:0], 5, 1.0).shape == (0, 4, 5)
    assert (label_scores(labels, layout, query, starts, lengths * 0, 3, 1.0) == -torch.inf).all()


@pytest.mark.parametrize("score", [label_scores, label_scores_reference])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.zeros(2, 9, 5, dtype=torch.uint8)}, "labels .* must be uint8"),
        ({"query": torch.zeros(1, 4, 5)}, "query .* must be float32"),
        ({"query": torch.zeros(1, 3, 4)}, "3 query heads must be a multiple"),
        ({"query": torch.zeros(1, 4, 4, dtype=torch.float16)}, "query .* must be float32"),
        ({"lengths": torch.tensor([5], dtype=torch.int32)}, "lengths .* must be int64"),
        ({"starts": torch.tensor([0, 0])}, "starts .* must be int64"),
        ({"max_length": 4}, "sequence 0: rows 0 to 5 do not fit"),
        ({"starts": torch.tensor([5])}, "sequence 0: rows 5 to 10 do not fit the cache's 9 rows"),
        ({"starts": torch.tensor([-1])}, "do not fit"),
        ({"out": torch.zeros(1, 4, 6)}, "out .* must be float32"),
        ({"out": torch.zeros(1, 5, 4).mT}, "contiguous"),
    ],
)
def test_wrong_arguments_are_named(score: Callable, change: dict, message: str) -> None:
    arguments = {
        "labels": torch.zeros(2, 9, 2, dtype=torch.uint8),
        "layout": LabelLayout(4, 2),
        "query": torch.zeros(1, 4, 4),
        "starts": torch.tensor([0]),
        "lengths": torch.tensor([5]),
        "max_length": 5,
        "scaling": 1.0,
    }
    score(**arguments)
    with pytest.raises(ValueError, match=message):
        score(**(arguments | change))


@pytest.mark.parametrize("group", [1, 3, 4, 7, 8, 12, 64, 71])
@pytest.mark.parametrize(("channels", "bits"), [(28, 2), (60, 2), (1, 16), (128, 8), (256, 16)])
def test_launch_fits_the_kernel(channels: int, bits: int, group: int) -> None:
    launch = scores_launch(LabelLayout(channels, bits), group)
    assert group % launch.heads == 0 and launch.heads <= 8
    for value in (launch.block, launch.tile):
        assert value & (value - 1) == 0
    assert launch.block * launch.tile <= 4096 and launch.block >= 32


def test_triton_kernel_in_the_interpreter(interpret: Callable[[str], None]) -> None:
    interpret("interpreted_label_scores.py")


@pytest.mark.gpu
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("channels", "kv_heads", "group", "lengths"),
    [
        (28, 3, 3, [5000, 1, 0, 513]),
        (1, 1, 1, [7]),
        (13, 2, 1, [64, 65]),
        (60, 8, 4, [1290, 3]),
        (60, 2, 8, [129]),
        (128, 1, 12, [333, 2]),
    ],
)
def test_cuda(bits: int, channels: int, kv_heads: int, group: int, lengths: list[int]) -> None:
    args = case(channels, bits, kv_heads, group, lengths)
    on_device = [value.cuda() if isinstance(value, torch.Tensor) else value for value in args]
    max_length = max(lengths) + 77
    out = poisoned(on_device[2], max_length)
    torch.cuda.set_sync_debug_mode("error")
    try:
        label_scores(*on_device, max_length, 0.3, out=out)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(out.cpu(), naive(*args, max_length, 0.3), **TOLERANCE)
    labels, layout, query, starts, tokens = on_device
    for b in range(len(lengths)):
        alone = label_scores(labels, layout, query[b : b + 1], starts[b : b + 1], tokens[b : b + 1], max_length, 0.3)
        assert torch.equal(alone[0], out[b])


@pytest.mark.gpu
def test_cuda_labels_beyond_2_to_31_bytes() -> None:
    layout = LabelLayout(28, 2)
    capacity = 2**28 + 4099
    needed = 2 * capacity * layout.row_bytes + 2**28
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.1f} GiB of free GPU memory")
    labels = torch.zeros(2, capacity, layout.row_bytes, dtype=torch.uint8, device="cuda")
    small, _, query, _, _ = case(28, 2, 2, 3, [4000])
    length = 4000
    labels[:, capacity - length :] = small[:, :length].cuda()
    starts, lengths = torch.tensor([capacity - length]), torch.tensor([length])
    out = label_scores(labels, layout, query.cuda(), starts.cuda(), lengths.cuda(), length, 0.3)
    expected = naive(small, layout, query, torch.tensor([0]), lengths, length, 0.3)
    torch.testing.assert_close(out.cpu(), expected, **TOLERANCE)


@pytest.mark.gpu
def test_cuda_graph_follows_the_lengths_and_queries_it_is_replayed_with() -> None:
    args = case(28, 2, 3, 3, [900, 40])
    labels, layout, query, starts, lengths = (v.cuda() if isinstance(v, torch.Tensor) else v for v in args)
    out = poisoned(query, 1000)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        label_scores(labels, layout, query, starts, lengths, 1000, 0.3, out=out)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        label_scores(labels, layout, query, starts, lengths, 1000, 0.3, out=out)
    for kept in ([3, 40], [900, 0]):
        lengths.copy_(torch.tensor(kept))
        query.mul_(-0.5)
        out.fill_(torch.nan)
        graph.replay()
        expected = naive(args[0], layout, query.cpu(), args[3], torch.tensor(kept), 1000, 0.3)
        torch.testing.assert_close(out.cpu(), expected, **TOLERANCE)
