"""Codes fitted to keys and queries whose best codes are known."""

from __future__ import annotations

import pytest
import torch

from ds_offload.codebooks import CodeSample, _parts, fit_codes, has_parts, random_codes, stack_codes
from ds_offload.kernels.product_code import ProductLayout, decode_product, encode_product_reference


def gaussian(heads: int, tokens: int, dim: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys with a mean and few wide directions, and the powers of queries of which few directions matter."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(2, heads, dim, dim, generator=generator) * torch.logspace(0.5, -1, dim)[:, None]
    keys = torch.randn(heads, tokens, dim, generator=generator) @ mix[0] + torch.randn(heads, 1, dim) * 5
    query = torch.randn(heads, 512, dim, generator=generator) @ mix[1]
    return keys, (query.mT @ query).double()


def score_error(keys: torch.Tensor, powers: torch.Tensor, decoded: torch.Tensor) -> torch.Tensor:
    """Share of the scores' variance over tokens that the code loses, by head: the queries' mean."""
    centred = (keys - keys.mean(1, keepdim=True)).double()
    lost = centred - (decoded - decoded.mean(1, keepdim=True)).double()
    of = [torch.einsum("htd,hde,hte->h", value, powers, value) for value in (lost, centred)]
    return of[0] / of[1]


@pytest.mark.parametrize("dim", [4, 20, 64, 80])
def test_the_turn_is_the_inverse_of_the_basis_and_words_are_means(dim: int) -> None:
    keys, powers = gaussian(2, 700, dim)
    code = fit_codes(keys, powers)
    torch.testing.assert_close(code.basis.double() @ code.turn.double(), torch.eye(dim).double().expand(2, -1, -1),
                               rtol=0, atol=1e-3)  # fmt: skip
    torch.testing.assert_close(code.mean, keys.mean(1), rtol=1e-5, atol=1e-5)
    rows = torch.empty(2, 700, code.layout.row_bytes, dtype=torch.uint8)
    encode_product_reference(keys, code, rows)
    error = score_error(keys, powers, decode_product(rows, code))
    assert (error < 0.45).all()


def test_axes_are_weighed_by_what_queries_make_of_them() -> None:
    keys, powers = gaussian(1, 2000, 32)
    errors = []
    for seen in (powers, torch.eye(32).double()[None]):
        code = fit_codes(keys, seen)
        rows = torch.empty(1, 2000, code.layout.row_bytes, dtype=torch.uint8)
        encode_product_reference(keys, code, rows)
        errors.append(score_error(keys, powers, decode_product(rows, code)).item())
    assert errors[0] < 0.8 * errors[1]


def test_clusters_in_a_part_are_found() -> None:
    generator = torch.Generator().manual_seed(3)
    centres = torch.randn(5, 4, generator=generator) * 10
    keys = centres[torch.randint(5, (4000,), generator=generator)] + torch.randn(4000, 4, generator=generator) * 0.01
    code = fit_codes(keys[None], torch.eye(4).double()[None])
    rows = torch.empty(1, 4000, 4, dtype=torch.uint8)
    encode_product_reference(keys[None], code, rows)
    torch.testing.assert_close(decode_product(rows, code)[0] + code.mean, keys, rtol=0, atol=0.1)


def test_parts_have_products_of_variances_alike() -> None:
    variances = torch.logspace(-6, 3, 64, dtype=torch.float64)[None].repeat(3, 1)
    variances[1] = 1
    variances[2, :60] = 0
    order = _parts(variances, ProductLayout(64))
    assert torch.equal(order.sort(-1).values, torch.arange(64).expand(3, -1))
    products = variances[0].log()[order[0]].view(16, 4).sum(-1)
    assert products.amax() - products.amin() < 0.15 * (variances[0].log().amax() - variances[0].log().amin())


@pytest.mark.parametrize("tokens", [1, 3, 17])
def test_few_keys_and_no_queries_make_a_sound_code(tokens: int) -> None:
    keys, _ = gaussian(2, tokens, 20)
    code = fit_codes(keys, torch.zeros(2, 20, 20).double())
    assert all(tensor.isfinite().all() for tensor in code.tensors())
    rows = torch.empty(2, tokens, code.layout.row_bytes, dtype=torch.uint8)
    encode_product_reference(keys, code, rows)
    if tokens <= 16:
        decoded = decode_product(rows, code) + code.mean[:, None]
        torch.testing.assert_close(decoded, keys, rtol=1e-2, atol=1e-2)


def test_a_sample_is_fitted_like_its_keys_and_queries_and_twice_the_same() -> None:
    generator = torch.Generator().manual_seed(5)
    sizes = torch.logspace(0, 1, 8)
    query, key = (torch.randn(9000, heads, 8, generator=generator) * sizes for heads in (6, 2))
    codes = []
    for _ in range(2):
        sample = CodeSample(2, 8, 9000, torch.device("cpu"))
        for some in range(0, 9000, 3000):
            sample.add(query[some : some + 3000], key[some : some + 3000])
        codes.append(sample.fit())
    for one, other in zip(codes[0].tensors(), codes[1].tensors(), strict=True):
        assert torch.equal(one, other)
    grouped = query.view(9000, 2, 3, 8).transpose(0, 1).reshape(2, -1, 8)
    expected = fit_codes(key[::3].transpose(0, 1), (grouped.mT @ grouped).double())
    torch.testing.assert_close(codes[0].mean, expected.mean)
    torch.testing.assert_close(codes[0].basis.abs(), expected.basis.abs(), rtol=1e-3, atol=1e-3)


def test_layers_are_stacked_and_random_codes_fit_them() -> None:
    layers = [fit_codes(*gaussian(2, 40, 8, seed)) for seed in range(3)]
    stacked = stack_codes(layers)
    for number, layer in enumerate(layers):
        for ours, theirs in zip(stacked.layer(number).tensors(), layer.tensors(), strict=True):
            assert torch.equal(ours, theirs)
    assert random_codes(3, 2, 8).words.shape == stacked.words.shape
    assert has_parts(8) and not has_parts(30)
