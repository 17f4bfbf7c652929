"""The Triton kernels of label scores on CPU tensors; run by test_label_scores.py under TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch
from label_cases import Case, label_case

from ds_offload.kernels.label_scores import group_scores_reference, label_scores_reference, quantise_query
from ds_offload.kernels.label_scores_inputs import ScoreInputs
from ds_offload.kernels.label_scores_launch import _arranged, launch_scores, launch_weights

SHAPES = [(1, 1), (7, 3), (28, 2), (44, 1), (60, 1), (11, 9), (70, 1)]
BITS = (16, 8, 4, 2)


def scores_of(case: Case, max_length: int, scaling: float) -> torch.Tensor:
    out = torch.full((*case[2].shape[:2], max_length), torch.nan)
    launch_scores(ScoreInputs(*case, max_length, scaling), out)
    return out


def weights_of(case: Case, max_length: int, scaling: float) -> torch.Tensor:
    out = torch.full((len(case[2]), len(case[0]), max_length), torch.nan)
    launch_weights(ScoreInputs(*case, max_length, scaling), out)
    return out


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("channels", "group"), SHAPES)
def test_kernels_equal_the_references(channels: int, group: int, bits: int) -> None:
    case = label_case(channels, bits, 2, group, [133, 160, 0])
    rounding = {"rtol": 1e-4, "atol": 2e-5} if bits == 16 else {"rtol": 2e-6, "atol": 1e-12}
    torch.testing.assert_close(scores_of(case, 170, 0.3), label_scores_reference(*case, 170, 0.3), **rounding)
    expected = group_scores_reference(*case, 170, 0.3, weights=True)
    torch.testing.assert_close(weights_of(case, 170, 0.3), expected, rtol=5e-5, atol=1e-8)


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize(("channels", "group"), SHAPES)
def test_queries_are_quantised_as_the_reference_does(channels: int, group: int, bits: int) -> None:
    labels, layout, query, *others = label_case(channels, bits, 2, group, [3, 3])
    query[1, 0] = 0
    inputs = ScoreInputs(labels, layout, query, *others, 3, 0.3)
    arranged = _arranged(inputs, 0.3)
    codes, factors = quantise_query(inputs.kept(), layout, 0.3)
    packed = arranged[:, :-2].contiguous().view(torch.int8).view(*query.shape[:2], layout.per_byte, layout.row_bytes)
    # Byte k of field m is channel k * per_byte + m.
    in_order = packed.mT.flatten(-2)
    assert torch.equal(in_order[..., :channels], codes.to(torch.int8))
    assert not in_order[..., channels:].any()
    highest = 2 ** (8 - bits)
    assert torch.equal(arranged[:, -2].view(torch.float32), (factors / highest).flatten())
    assert torch.equal(arranged[:, -1], (highest * layout.largest * codes.sum(-1)).flatten().to(torch.int32))


@pytest.mark.parametrize("group", [1, 2])
def test_many_blocks_and_many_parts(group: int) -> None:
    case = label_case(60, 2, 1, group, [3000])
    torch.testing.assert_close(scores_of(case, 3100, 1.0), label_scores_reference(*case, 3100, 1.0), rtol=2e-6, atol=0)
    expected = group_scores_reference(*case, 3100, 1.0, weights=True)
    weights = weights_of(case, 3100, 1.0)
    torch.testing.assert_close(weights, expected, rtol=5e-5, atol=1e-8)
    assert torch.equal(weights_of(case, 3333, 1.0)[..., :3100], weights)


def test_no_tokens() -> None:
    labels, layout, query, channels, starts, lengths = label_case(28, 2, 1, 2, [5])
    case = (labels, layout, query, channels, starts, lengths * 0)
    assert scores_of(case, 0, 1.0).shape == (1, 2, 0)
    assert (weights_of(case, 40, 1.0) == 0).all()
    assert (scores_of(case, 40, 1.0) == -torch.inf).all()
