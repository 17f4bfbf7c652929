"""Scores of groups of query heads (kernels/label_scores.py) against a softmax in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from label_cases import Case, exact_weights, label_case, to_cuda

from ds_offload.kernels.label_scores import group_scores, group_scores_reference, label_scores, label_scores_reference

BITS = (16, 8, 4, 2)
SHAPES = [
    (28, 3, 3, [1000, 1, 0, 513]),
    (44, 2, 2, [64, 65]),
    (60, 1, 8, [129]),
    (33, 2, 12, [300, 7]),
    (7, 2, 1, [90, 0]),
]
# Weights are exponentials of scores of order 1 to 10, and sums of many.
TOLERANCE = {"rtol": 5e-5, "atol": 1e-8}


def poisoned(case: Case, max_length: int) -> torch.Tensor:
    return torch.full((len(case[2]), len(case[0]), max_length), torch.nan, device=case[0].device)


def only(case: Case, b: int) -> Case:
    """Sequence b of a case by itself."""
    labels, layout, query, channels, starts, lengths = case
    return labels, layout, query[b : b + 1], channels, starts[b : b + 1], lengths[b : b + 1]


def check_weights(out: torch.Tensor, case: Case, scaling: float) -> None:
    """Compare with the definition: the weights, their sum, and zeros where there is no token."""
    out, lengths = out.cpu(), case[5].tolist()
    group = case[2].shape[1] // len(case[0])
    torch.testing.assert_close(out.double(), exact_weights(case, out.shape[2], scaling), **TOLERANCE)
    for b, length in enumerate(lengths):
        assert (out[b, :, length:] == 0).all()
        expected = torch.full((out.shape[1],), float(group if length else 0))
        torch.testing.assert_close(out[b].sum(-1), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("score", [group_scores, group_scores_reference])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("channels", "kv_heads", "group", "lengths"), SHAPES)
def test_weights(score: Callable, bits: int, channels: int, kv_heads: int, group: int, lengths: list[int]) -> None:
    case = label_case(channels, bits, kv_heads, group, lengths)
    for max_length in (max(lengths), max(lengths) + 100):
        out = poisoned(case, max_length)
        assert score(*case, max_length, 0.7, out=out, weights=group == 1) is out
        check_weights(out, case, 0.7)


@pytest.mark.parametrize(
    ("grouped", "score"), [(group_scores, label_scores), (group_scores_reference, label_scores_reference)]
)
@pytest.mark.parametrize("bits", BITS)
def test_one_query_head_per_kv_head_gives_its_scores(grouped: Callable, score: Callable, bits: int) -> None:
    case = label_case(28, bits, 3, 1, [70, 0, 5])
    assert torch.equal(grouped(*case, 80, 0.3), score(*case, 80, 0.3))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", [1, 3])
def test_a_sequence_weighs_the_same_in_every_batch(bits: int, group: int) -> None:
    case = label_case(28, bits, 2, group, [700, 1, 1103])
    together = group_scores(*case, 1201, 0.3, weights=True)
    for b, length in enumerate(case[5].tolist()):
        alone = group_scores(*only(case, b), length, 0.3, weights=True)
        assert torch.equal(together[b, :, :length], alone[0])


def test_scores_far_apart_leave_no_nan() -> None:
    case = label_case(28, 8, 2, 2, [300])
    out = group_scores(*case, 310, 1e4)
    assert out.isfinite().all()
    torch.testing.assert_close(out[0].sum(-1), torch.full((2,), 2.0))


@pytest.mark.parametrize("score", [group_scores, group_scores_reference])
def test_nothing_to_score(score: Callable) -> None:
    labels, layout, query, channels, starts, lengths = label_case(4, 2, 2, 2, [5])
    assert score(labels, layout, query, channels, starts, lengths * 0, 0, 1.0).shape == (1, 2, 0)
    assert score(labels, layout, query[:0], channels, starts[:0], lengths[:0], 5, 1.0).shape == (0, 2, 5)
    assert (score(labels, layout, query, channels, starts, lengths * 0, 3, 1.0) == 0).all()


@pytest.mark.parametrize("score", [group_scores, group_scores_reference])
def test_a_wrong_result_is_named(score: Callable) -> None:
    case = label_case(4, 2, 2, 2, [5])
    for out in (torch.zeros(1, 4, 5), torch.zeros(1, 2, 5, dtype=torch.float64), torch.zeros(1, 5, 2).mT):
        with pytest.raises(ValueError, match=r"out .* must be float32 \(1, 2, 5\), contiguous"):
            score(*case, 5, 1.0, out=out)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("channels", "kv_heads", "group", "lengths"), [*SHAPES, (60, 8, 4, [40_000, 3]), (128, 1, 71, [333, 2])]
)
def test_cuda(bits: int, channels: int, kv_heads: int, group: int, lengths: list[int]) -> None:
    case = label_case(channels, bits, kv_heads, group, lengths)
    on_device = to_cuda(case)
    max_length = max(lengths) + 77
    out = poisoned(on_device, max_length)
    torch.cuda.set_sync_debug_mode("error")
    try:
        group_scores(*on_device, max_length, 0.7, out=out, weights=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    check_weights(out, case, 0.7)
    for b, length in enumerate(lengths):
        alone = group_scores(*only(on_device, b), length, 0.7, weights=True)
        assert torch.equal(alone[0], out[b, :, :length])
    if group == 1:
        scores = group_scores(*on_device, max_length, 0.7)
        assert torch.equal(scores, label_scores(*on_device, max_length, 0.7))


@pytest.mark.gpu
def test_cuda_totals_of_more_parts_than_are_read_at_a_time() -> None:
    case = label_case(28, 2, 1, 2, [600_000, 9])
    on_device = to_cuda(case)
    out = group_scores(*on_device, 600_001, 0.3)
    check_weights(out, case, 0.3)
    assert torch.equal(out, group_scores(*on_device, 600_001, 0.3))


@pytest.mark.gpu
def test_cuda_graph_follows_the_lengths_and_queries_it_is_replayed_with() -> None:
    case = label_case(60, 2, 2, 4, [900, 40])
    on_device = to_cuda(case)
    query, lengths = on_device[2], on_device[5]
    out = poisoned(on_device, 1000)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        group_scores(*on_device, 1000, 0.3, out=out)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        group_scores(*on_device, 1000, 0.3, out=out)
    for kept in ([3, 40], [900, 0]):
        lengths.copy_(torch.tensor(kept))
        query.mul_(-0.5)
        out.fill_(torch.nan)
        graph.replay()
        check_weights(out, (*case[:2], query.cpu(), *case[3:5], torch.tensor(kept)), 0.3)
