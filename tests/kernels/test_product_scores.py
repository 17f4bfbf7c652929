"""Scores of product codes against products in float64 with decoded labels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from product_cases import Case, exact_scores, only, product_case, table_steps, to_cuda, weights_of, with_out

from ds_offload.kernels import label_scores_cpu
from ds_offload.kernels.product_code import ProductLayout
from ds_offload.kernels.product_scores import (
    ProductInputs,
    product_scores,
    product_scores_reference,
    query_tables,
)
from ds_offload.kernels.product_scores_launch import product_launch

SHAPES = [
    (64, 3, 3, [1000, 1, 0, 513]),
    (64, 1, 1, [7]),
    (20, 2, 4, [64, 65]),
    (80, 2, 1, [300, 7]),
    (96, 1, 3, [129]),
    (128, 2, 4, [70, 0]),
    (256, 1, 5, [33, 2]),
]


def check_scores(out: torch.Tensor, case: Case, scaling: float, weights: bool) -> None:
    """Within half a step for every part of the exact ones; weights by as much as such scores may change them."""
    out, kv_heads = out.cpu().double(), len(case[0])
    exact = exact_scores(case, out.shape[2], scaling)
    lengths = case[4]
    # A step for each part whose number rounds to the other side, and float32's own rounding.
    off = table_steps(case, scaling) * case[1].layout.parts * 0.51 + 1e-4
    if case[2].shape[1] == kv_heads and not weights:
        assert torch.equal(out.isinf(), exact.isinf())
        assert ((out - exact).nan_to_num().abs() <= off[..., None]).all()
        return
    for b, length in enumerate(lengths.tolist()):
        assert (out[b, :, length:] == 0).all()
    expected = weights_of(exact, lengths, kv_heads)
    most = off.unflatten(1, (kv_heads, -1)).amax(-1)[..., None]
    assert (out <= expected * (2 * most).exp() * 1.0001 + 1e-8).all()
    assert (out >= expected * (-2 * most).exp() * 0.9999 - 1e-8).all()
    group = case[2].shape[1] // kv_heads
    total = (lengths > 0).double()[:, None].expand(-1, kv_heads) * group
    torch.testing.assert_close(out.sum(-1), total, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("score", [product_scores, product_scores_reference])
@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize(("head_dim", "kv_heads", "group", "lengths"), SHAPES)
def test_scores(score: Callable, weights: bool, head_dim: int, kv_heads: int, group: int, lengths: list[int]) -> None:
    case = product_case(head_dim, kv_heads, group, lengths)
    for max_length in (max(lengths), max(lengths) + 100):
        out = with_out(case, max_length)
        assert score(*case, max_length, 0.2, out=out, weights=weights) is out
        check_scores(out, case, 0.2, weights)
        assert torch.equal(score(*case, max_length, 0.2, weights=weights), out)


@pytest.mark.parametrize(("head_dim", "kv_heads", "group", "lengths"), SHAPES)
def test_the_cpu_looks_up_what_the_reference_does(head_dim: int, kv_heads: int, group: int, lengths: list[int]) -> None:
    case = product_case(head_dim, kv_heads, group, lengths)
    expected = product_scores_reference(*case, max(lengths), 0.2)
    torch.testing.assert_close(product_scores(*case, max(lengths), 0.2), expected, rtol=1e-5, atol=1e-6)


WHOLE_SHAPES = [(head_dim, kv_heads, lengths) for head_dim, kv_heads, group, lengths in SHAPES if group == 1]


def check_whole(out: torch.Tensor, case: Case, scaling: float, off: float) -> None:
    """The numbers that the reference's scores are multiples of, or up to `off` more or less."""
    out, max_length = out.cpu(), out.shape[2]
    numbers, steps, offsets = query_tables(ProductInputs(*case, max_length, scaling))
    scores = product_scores_reference(*case, max_length, scaling)
    assert out.dtype == torch.int16 and (out[scores.isinf()] == -1).all()
    expected = (out * steps[..., None] + offsets[..., None]).masked_fill(out < 0, -torch.inf)
    assert ((expected - scores).nan_to_num().abs() <= off * steps[..., None] + 1e-5).all()
    assert out.amax() <= 255 * numbers.shape[2]


@pytest.mark.parametrize("score", [product_scores, product_scores_reference])
@pytest.mark.parametrize(("head_dim", "kv_heads", "lengths"), WHOLE_SHAPES)
def test_whole_numbers_order_tokens_as_scores_do(
    score: Callable, head_dim: int, kv_heads: int, lengths: list[int]
) -> None:
    case = product_case(head_dim, kv_heads, 1, lengths)
    max_length = max(lengths) + 9
    out = with_out(case, max_length).to(torch.int16)
    assert score(*case, max_length, 0.2, out=out, whole=True) is out
    check_whole(out, case, 0.2, 0.0)


@pytest.mark.parametrize(("group", "largest"), [(1, 255), (2, 255), (3, 63), (4, 63), (5, 255), (8, 63)])
def test_numbers_fill_their_bits_and_stand_for_the_table(group: int, largest: int) -> None:
    case = product_case(64, 2, group, [5])
    inputs = ProductInputs(*case, 5, 0.3)
    numbers, steps, offsets = query_tables(inputs)
    assert torch.equal(numbers, numbers.round()) and numbers.amin() == 0
    assert torch.equal(numbers.amax((-2, -1)), torch.full((1, 2 * group), float(largest)))
    torch.testing.assert_close(steps.double(), table_steps(case, 0.3), rtol=1e-4, atol=0)
    # A label of words 0 alone scores the sum of their numbers.
    labels = torch.zeros_like(case[0])
    scores = product_scores_reference(labels, *case[1:], 5, 0.3, weights=True)
    torch.testing.assert_close(scores, torch.full((1, 2, 5), group / 5))
    exact = exact_scores((labels, *case[1:]), 5, 0.3)
    torch.testing.assert_close(
        (numbers[..., 0].sum(-1) * steps + offsets).double(), exact[..., 0], rtol=0, atol=float(steps.max()) * 8.1
    )


@pytest.mark.parametrize("score", [product_scores, product_scores_reference])
@pytest.mark.parametrize("scaling", [0.2, 30.0])
@pytest.mark.parametrize(("head_dim", "kv_heads", "group", "lengths"), SHAPES)
def test_whole_numbers_of_weights_are_their_logarithms(
    score: Callable, scaling: float, head_dim: int, kv_heads: int, group: int, lengths: list[int]
) -> None:
    case, max_length = product_case(head_dim, kv_heads, group, lengths), max(lengths) + 9
    out = with_out(case, max_length).to(torch.int16)
    assert score(*case, max_length, scaling, out=out, weights=True, whole=True) is out
    check_logarithms(out, score(*case, max_length, scaling, weights=True), group, case[4])


def check_logarithms(out: torch.Tensor, weights: torch.Tensor, group: int, lengths: torch.Tensor) -> None:
    """Whole numbers `out` of `weights`, each rounded down, but for the last bits of a logarithm."""
    expected = (240 * (weights.double() / group).log2() + 32640).clamp(0, 32640)
    there = torch.arange(out.shape[2], device=out.device) < lengths[:, None, None]
    assert (out[~there.expand_as(out)] == -1).all()
    lower = (expected - out)[there.expand_as(out)]
    assert lower.numel() == 0 or (lower.min() > -0.05 and lower.max() < 1.05)


def test_queries_of_zeros_weigh_all_tokens_alike() -> None:
    labels, code, query, *others = product_case(64, 2, 2, [40])
    out = product_scores(labels, code, query * 0, *others, 40, 1.0)
    torch.testing.assert_close(out, torch.full_like(out, 2 / 40))


def test_scores_far_apart_leave_no_nan() -> None:
    case = product_case(64, 2, 2, [300])
    out = product_scores(*case, 310, 1e4)
    assert out.isfinite().all()
    torch.testing.assert_close(out[0].sum(-1), torch.full((2,), 2.0))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("group", [1, 3])
def test_a_sequence_scores_the_same_in_every_batch(group: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = product_case(64, 2, group, [700, 1, 1100])
    alone = [product_scores(*only(case, b), 1100, 0.3)[0] for b in range(3)]
    monkeypatch.setattr(label_scores_cpu, "LOOKUPS_PER_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    together = product_scores(*case, 1200, 0.3)
    for b in range(3):
        assert torch.equal(together[b, :, :1100], alone[b])


def test_nothing_to_score() -> None:
    labels, code, query, starts, lengths = product_case(20, 2, 2, [5])
    for score in (product_scores, product_scores_reference):
        assert score(labels, code, query, starts, lengths * 0, 0, 1.0).shape == (1, 2, 0)
        assert score(labels, code, query[:0], starts[:0], lengths[:0], 5, 1.0).shape == (0, 2, 5)
        assert (score(labels, code, query, starts, lengths * 0, 3, 1.0) == 0).all()


@pytest.mark.parametrize("score", [product_scores, product_scores_reference])
def test_wrong_arguments_are_named(score: Callable) -> None:
    labels, code, query, starts, lengths = product_case(20, 2, 2, [5])
    arguments = {
        "labels": labels, "code": code, "query": query, "starts": starts, "lengths": lengths, "max_length": 5,
        "scaling": 1.0,
    }  # fmt: skip
    score(**arguments)
    changes = [
        ({"labels": labels[..., :3]}, r"labels .* must be uint8 \[Hkv, N, 4\]"),
        ({"query": query[..., :16]}, "a code of 2 KV heads of 20 channels does not fit"),
        ({"query": query[:, :3]}, "3 query heads must be a multiple"),
        ({"lengths": lengths.int()}, "lengths .* must be int64"),
        ({"max_length": 4}, "sequence 0: rows 3 to 8 do not fit"),
        ({"out": torch.zeros(1, 4, 5)}, r"out .* must be float32 \(1, 2, 5\)"),
    ]
    for change, message in changes:
        with pytest.raises(ValueError, match=message):
            score(**(arguments | change))


@pytest.mark.parametrize("group", [1, 3, 4, 7, 8, 12, 64, 71])
@pytest.mark.parametrize("head_dim", [4, 64, 80, 128, 256])
def test_launch_fits_the_kernels(head_dim: int, group: int) -> None:
    layout = ProductLayout(head_dim)
    launch = product_launch(layout, group)
    assert group % launch.heads == 0 and launch.heads <= 4
    for value in (launch.block, launch.part, launch.vector):
        assert value & (value - 1) == 0
    assert layout.row_bytes % (4 * launch.vector) == 0 and launch.vector <= 4


@pytest.mark.gpu
@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("head_dim", "kv_heads", "group", "lengths"),
    [*SHAPES, (128, 8, 4, [40_000, 3]), (128, 32, 1, [5000]), (64, 1, 71, [333, 2]), (128, 2, 8, [1290])],
)
def test_cuda(head_dim: int, kv_heads: int, group: int, lengths: list[int], dtype: torch.dtype, weights: bool) -> None:
    labels, code, query, *others = product_case(head_dim, kv_heads, group, lengths)
    case = (labels, code, query.to(dtype), *others)
    on_device = to_cuda(case)
    max_length = max(lengths) + 77
    out = with_out(on_device, max_length)
    torch.cuda.set_sync_debug_mode("error")
    try:
        product_scores(*on_device, max_length, 0.2, out=out, weights=weights)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    check_scores(out, case, 0.2, weights)
    for b, length in enumerate(lengths):
        alone = product_scores(*only(on_device, b), length, 0.2, weights=weights)
        assert torch.equal(alone[0], out[b, :, :length])


@pytest.mark.gpu
@pytest.mark.parametrize(("head_dim", "kv_heads", "lengths"), [*WHOLE_SHAPES, (128, 32, [5000, 17])])
def test_cuda_whole_numbers(head_dim: int, kv_heads: int, lengths: list[int]) -> None:
    case = product_case(head_dim, kv_heads, 1, lengths)
    max_length = max(lengths) + 77
    out = product_scores(*to_cuda(case), max_length, 0.2, whole=True)
    # An entry may round to the other side.
    check_whole(out, case, 0.2, 2.0)


@pytest.mark.gpu
@pytest.mark.parametrize(("head_dim", "kv_heads", "group", "lengths"), [*SHAPES, (128, 8, 4, [40_000, 3, 0])])
def test_cuda_logarithms_of_weights(head_dim: int, kv_heads: int, group: int, lengths: list[int]) -> None:
    case = to_cuda(product_case(head_dim, kv_heads, group, lengths))
    for max_length in (max(lengths), max(lengths) + 77):
        out = product_scores(*case, max_length, 0.2, weights=True, whole=True)
        check_logarithms(out, product_scores(*case, max_length, 0.2, weights=True), group, case[4])


@pytest.mark.gpu
def test_cuda_graph_follows_the_lengths_and_queries_it_is_replayed_with() -> None:
    case = product_case(128, 2, 4, [900, 40])
    on_device = to_cuda(case)
    query, lengths = on_device[2], on_device[4]
    out = with_out(on_device, 1000)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        product_scores(*on_device, 1000, 0.2, out=out)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        product_scores(*on_device, 1000, 0.2, out=out)
    for kept in ([3, 40], [900, 0]):
        lengths.copy_(torch.tensor(kept))
        query.mul_(-0.5)
        out.fill_(torch.nan)
        graph.replay()
        check_scores(out, (*case[:2], query.cpu(), case[3], torch.tensor(kept)), 0.2, True)
