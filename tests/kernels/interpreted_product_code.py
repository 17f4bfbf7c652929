"""The Triton kernels of product codes on CPU tensors; run by test_product_code.py under TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch
from product_cases import product_case, product_code

from ds_offload.kernels.product_code import ProductLayout, encode_product_reference, launch_encode, unpack_parts
from ds_offload.kernels.product_lookup import sum_words
from ds_offload.kernels.product_scores import ProductInputs, product_scores_reference, query_tables
from ds_offload.kernels.product_scores_kernels import sums_kernel
from ds_offload.kernels.product_scores_launch import _tables, launch_scores, launch_weights, product_launch

DIMS = [4, 20, 64, 80, 96, 128, 256]
SHAPES = [(4, 1), (20, 8), (64, 3), (64, 2), (80, 1), (96, 4), (128, 1), (128, 4), (256, 2)]


@pytest.mark.parametrize("head_dim", DIMS)
def test_encoding_equals_the_reference(head_dim: int) -> None:
    code = product_code(2, head_dim=head_dim)
    layout = code.layout
    keys = torch.randn(2, 67, head_dim, generator=torch.Generator().manual_seed(2)) + code.mean[:, None]
    expected, out = (torch.full((2, 67, layout.row_bytes), 255, dtype=torch.uint8) for _ in range(2))
    encode_product_reference(keys, code, expected)
    launch_encode(keys, code, out, None, None)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("head_dim", [12, 64])
def test_new_tokens_land_behind_their_sequence(head_dim: int) -> None:
    code = product_code(3, head_dim=head_dim)
    rows = torch.full((3, 50, code.layout.row_bytes), 9, dtype=torch.uint8)
    expected = rows.clone()
    kv = torch.randn(2, 3, 2, head_dim, generator=torch.Generator().manual_seed(2))
    keys = kv[:, :, 0].transpose(0, 1)
    labels = torch.empty(3, 2, code.layout.row_bytes, dtype=torch.uint8)
    encode_product_reference(keys, code, labels)
    expected[:, [7, 31]] = labels
    launch_encode(keys, code, rows, torch.tensor([0, 30]), torch.tensor([7, 1]))
    assert torch.equal(rows, expected)


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("head_dim", [20, 64])
def test_tables_equal_the_reference(head_dim: int, group: int) -> None:
    case = product_case(head_dim, 2, group, [3, 3])
    case[2][1, 0] = 0
    inputs = ProductInputs(*case, 3, 0.3)
    heads = product_launch(case[1].layout, group).heads
    table, factors = _tables(inputs, product_launch(case[1].layout, group), 0.3)
    numbers, steps, offsets = query_tables(inputs)
    shift = (8 if heads > 2 else 16) * torch.arange(heads)
    ours = (table[:, None] >> shift[:, None, None]) & 255
    assert (ours.view(numbers.shape) - numbers).abs().max() <= 1
    assert (ours.view(numbers.shape) == numbers).float().mean() > 0.999
    torch.testing.assert_close(factors.view(2, -1, 2)[..., 0], steps, rtol=1e-5, atol=1e-30)
    torch.testing.assert_close(factors.view(2, -1, 2)[..., 1], offsets, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("head_dim", "group"), SHAPES)
def test_scores_equal_the_reference(head_dim: int, group: int) -> None:
    case = product_case(head_dim, 2, group, [133, 0, 160])
    inputs = ProductInputs(*case, 170, 0.3)
    if group == 1:
        out = torch.full((3, 2, 170), torch.nan)
        launch_scores(inputs, out)
        steps = query_tables(inputs)[1].amax()
        expected = product_scores_reference(*case, 170, 0.3)
        assert torch.equal(out.isinf(), expected.isinf())
        # An entry may round to the other side.
        difference = (out - expected).nan_to_num()
        assert difference.abs().max() <= 2.01 * steps
        whole = torch.full((3, 2, 170), -77, dtype=torch.int16)
        launch_scores(inputs, whole)
        assert (whole - product_scores_reference(*case, 170, 0.3, whole=True)).abs().max() <= 2
        assert torch.equal(whole == -1, expected.isinf())
    out = torch.full((3, 2, 170), torch.nan)
    launch_weights(inputs, out)
    expected = product_scores_reference(*case, 170, 0.3, weights=True)
    # An entry may round to the other side, which is worth more where numbers have 6 bits.
    torch.testing.assert_close(out, expected, rtol=2e-2 if inputs.group < 3 else 0.1, atol=1e-6)
    assert torch.equal(out == 0, expected == 0)
    whole = torch.full((3, 2, 170), -77, dtype=torch.int16)
    launch_weights(inputs, whole)
    assert torch.equal(whole == -1, expected == 0)
    numbers = (240 * (out / group).log2() + 32640).clamp(0, 32640)
    assert (whole.float() - numbers)[expected > 0].abs().max() <= 1.01


@pytest.mark.parametrize("heads", [1, 2, 3, 4])
def test_the_largest_sums_fit(heads: int) -> None:
    layout = ProductLayout(512)
    launch = product_launch(layout, heads)
    labels = torch.randint(256, (1, 40, layout.row_bytes), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    largest = 0x3F3F3F3F if heads > 2 else 0x00FF00FF
    table = torch.full((1, layout.parts, 16), largest, dtype=torch.int32)
    sums = torch.zeros(1, sum_words(heads), 64, dtype=torch.int32)
    sums_kernel[(1, 1, 1)](
        *(labels, table, torch.zeros(heads, 2), torch.tensor([0]), torch.tensor([40])),
        *(sums, torch.empty(heads, 2, 1), labels.stride(0), 1, heads, 1, 64),
        PARTS=layout.parts,
        ROW_WORDS=layout.row_bytes // 4,
        HEADS=launch.heads,
        VECTOR=launch.vector,
        LOOKUP="",
        EACH=2,
        BLOCK=64,
    )
    halves = sums.view(torch.int16).unflatten(-1, (64, 2))
    assert (halves[:, :, :40] == layout.parts * launch.largest).all() and (halves[:, :, 40:] == 0).all()


@pytest.mark.parametrize("group", [1, 3])
def test_many_blocks_and_many_parts(group: int) -> None:
    case = product_case(64, 1, group, [3000])
    outs = []
    for width in (3100, 3333):
        out = torch.full((1, 1, width), torch.nan)
        launch_weights(ProductInputs(*case, width, 1.0), out)
        outs.append(out)
    torch.testing.assert_close(outs[0], product_scores_reference(*case, 3100, 1.0, weights=True), rtol=5e-2, atol=1e-6)
    assert torch.equal(outs[1][..., :3100], outs[0])


def test_no_tokens() -> None:
    labels, code, query, starts, lengths = product_case(64, 1, 2, [5])
    inputs = ProductInputs(labels, code, query, starts, lengths * 0, 40, 1.0)
    out = torch.full((1, 1, 40), torch.nan)
    launch_weights(inputs, out)
    assert (out == 0).all()
    assert unpack_parts(labels, code.layout).max() < 16
