"""Label cache: where labels land, what is in them, and what their scores are."""

from __future__ import annotations

import pytest
import torch
from product_cases import product_code

from ds_offload.kernels.label_codec import LabelLayout, decode_labels
from ds_offload.kernels.product_code import decode_product, encode_product_reference
from ds_offload.memory.label_cache import LabelCache
from ds_offload.memory.label_code import ProductLabels, ScalarLabels

HEADS, DIM, LAYERS = 2, 16, 3


def make(capacities: list[int], layout: LabelLayout) -> tuple[LabelCache, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    channels = torch.stack([torch.randperm(DIM, generator=generator) for _ in range(LAYERS * HEADS)])
    channels = channels.view(LAYERS, HEADS, DIM)
    mean = torch.randn(LAYERS, HEADS, DIM, generator=generator)
    code = ScalarLabels(layout, channels, mean, torch.device("cpu"))
    return LabelCache(code, capacities, torch.device("cpu")), channels, mean


def make_product(capacities: list[int]) -> LabelCache:
    code = ProductLabels(product_code(LAYERS, HEADS, head_dim=DIM), torch.device("cpu"))
    return LabelCache(code, capacities, torch.device("cpu"))


@pytest.mark.parametrize("product", [False, True])
def test_a_prompt_in_pieces_equals_a_whole_one_and_stays_in_its_layer(product: bool) -> None:
    capacities = [13, 7]
    keys = torch.randn(2, HEADS, 13, DIM, generator=torch.Generator().manual_seed(1))
    whole, pieces = (make_product(capacities) if product else make(capacities, LabelLayout(10, 2))[0] for _ in range(2))
    for number, capacity in enumerate(capacities):
        whole.write_prompt(1, number, 0, keys[number, :, :capacity])
        pieces.write_prompt(1, number, 0, keys[number, :, :5])
        pieces.write_prompt(1, number, 5, keys[number, :, 5:capacity])
    assert torch.equal(whole.rows, pieces.rows)
    assert not whole.rows[0].any() and not whole.rows[2].any()


@pytest.mark.parametrize("product", [False, True])
def test_labels_can_be_made_again_from_stored_keys(product: bool) -> None:
    # Of many keys a few lie between two words.
    tokens = 4000 if product else 13
    keys = torch.randn(HEADS, tokens, DIM, generator=torch.Generator().manual_seed(1))
    first, again, exact = (
        make_product([tokens]) if product else make([tokens], LabelLayout(12, 8))[0] for _ in range(3)
    )
    first.write_prompt(1, 0, 0, keys, torch.bfloat16)
    again.write_prompt(1, 0, 0, keys.bfloat16(), torch.bfloat16)
    exact.write_prompt(1, 0, 0, keys)
    assert torch.equal(first.rows, again.rows)
    assert not torch.equal(first.rows, exact.rows)


def test_one_layers_labels_share_the_cache() -> None:
    layout = LabelLayout(10, 2)
    cache, channels, mean = make([13, 7], layout)
    layer = cache.layer(1)
    assert layer.rows.data_ptr() == cache.rows[1].data_ptr() and layer.layout == layout
    assert torch.equal(layer.channels, channels[1, :, :10])
    assert torch.equal(layer.mean, mean[1].gather(-1, channels[1, :, :10]))
    assert layer.starts.tolist() == [0, 13]


def test_labels_are_the_kept_channels_less_their_mean_and_scores_use_the_same_channels() -> None:
    layout = LabelLayout(10, 16)
    cache, channels, mean = make([40], layout)
    keys = torch.randn(HEADS, 40, DIM)
    cache.write_prompt(2, 0, 0, keys)
    kept = channels[2, :, None, :10].expand(-1, 40, -1)
    expected = (keys - mean[2, :, None]).gather(-1, kept)
    assert torch.allclose(decode_labels(cache.rows[2], layout), expected, atol=2e-3)
    query = torch.randn(1, 4, DIM)
    scores = cache.scores(2, query, torch.tensor([33]), 40, 0.5)
    heads = channels[2, :, :10].repeat_interleave(2, 0)
    exact = 0.5 * torch.einsum("hr,htr->ht", query[0].gather(-1, heads), expected.repeat_interleave(2, 0))
    weights = exact[:, :33].softmax(-1).unflatten(0, (HEADS, 2)).sum(1)
    assert torch.allclose(scores[0, :, :33], weights, atol=1e-2)
    assert (scores[0, :, 33:] == 0).all()


@pytest.mark.parametrize("bits", [2, 16])
def test_one_query_head_per_kv_head_gives_scores_or_weights(bits: int) -> None:
    cache, _, _ = make([40, 9], LabelLayout(10, bits))
    for sequence, tokens in enumerate((40, 9)):
        cache.write_prompt(0, sequence, 0, torch.randn(HEADS, tokens, DIM))
    query, lengths = torch.randn(2, HEADS, DIM, dtype=torch.bfloat16), torch.tensor([33, 0])
    scores = cache.scores(0, query, lengths, 40, 0.5)
    assert (scores[0, :, 33:] == -torch.inf).all() and (scores[1] == -torch.inf).all()
    weights = cache.scores(0, query, lengths, 40, 0.5, weights=True)
    torch.testing.assert_close(weights[0], scores[0].softmax(-1))
    assert (weights[1] == 0).all()


def test_product_labels_are_those_of_the_keys_and_scores_use_their_layers_code() -> None:
    cache = make_product([40])
    keys = torch.randn(HEADS, 40, DIM)
    cache.write_prompt(2, 0, 0, keys)
    code = product_code(LAYERS, HEADS, head_dim=DIM).layer(2)
    expected = torch.zeros_like(cache.rows[2])
    encode_product_reference(keys, code, expected)
    assert torch.equal(cache.rows[2], expected)
    query = torch.randn(1, 4, DIM)
    scores = cache.scores(2, query, torch.tensor([33]), 40, 0.5)
    decoded = decode_product(expected, code).repeat_interleave(2, 0)
    exact = 0.5 * torch.einsum("hr,htr->ht", query[0], decoded)
    weights = exact[:, :33].softmax(-1).unflatten(0, (HEADS, 2)).sum(1)
    torch.testing.assert_close(scores[0, :, :33], weights, rtol=0.1, atol=1e-3)
    assert (scores[0, :, 33:] == 0).all()
    layer = cache.layer(1)
    assert layer.rows.data_ptr() == cache.rows[1].data_ptr()
    assert torch.equal(layer.code.words, product_code(LAYERS, HEADS, head_dim=DIM).words[1])


def test_where_only_the_order_matters_product_labels_give_whole_numbers() -> None:
    cache = make_product([40, 9])
    for sequence, tokens in enumerate((40, 9)):
        cache.write_prompt(0, sequence, 0, torch.randn(HEADS, tokens, DIM))
    query, lengths = torch.randn(2, HEADS, DIM), torch.tensor([33, 9])
    scores = cache.scores(0, query, lengths, 40, 0.5)
    whole = cache.scores(0, query, lengths, 40, 0.5, order=True)
    assert whole.dtype == torch.int16 and torch.equal(whole == -1, scores.isinf())
    for numbers, floats in zip(whole.flatten(0, 1), scores.flatten(0, 1), strict=True):
        assert torch.equal(numbers.sort(stable=True).indices, floats.sort(stable=True).indices)
    # Of weights they are logarithms.
    grouped = torch.randn(2, 2 * HEADS, DIM)
    weights = cache.scores(0, grouped, lengths, 40, 0.5)
    whole = cache.scores(0, grouped, lengths, 40, 0.5, order=True)
    assert whole.dtype == torch.int16 and torch.equal(whole == -1, weights == 0)
    for numbers, floats in zip(whole.flatten(0, 1), weights.flatten(0, 1), strict=True):
        assert (floats[numbers.sort(stable=True).indices].diff() > -0.003 * floats.max()).all()
    # Where weights are asked for they are given, and other labels have no whole numbers.
    assert cache.scores(0, query, lengths, 40, 0.5, weights=True, order=True).dtype == torch.float32
    scalar, _, _ = make([40, 9], LabelLayout(10, 4))
    assert scalar.scores(0, query, lengths, 40, 0.5, order=True).dtype == torch.float32
