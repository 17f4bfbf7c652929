"""The Triton kernels of skinny linear layers on CPU tensors; run by test_skinny_linear.py under TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch

from ds_offload.kernels.skinny_linear import (
    SkinnyLinearLaunch,
    _launch,
    gated_linear_reference,
    skinny_linear_launch,
    skinny_linear_reference,
)

F32, F16 = torch.float32, torch.float16
TOLERANCE = {F32: {"rtol": 1e-5, "atol": 1e-5}, F16: {"rtol": 2e-3, "atol": 2e-3}}


def values(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    return (scale * torch.randn(shape)).to(dtype)


def run(x, weights, biases=None, norm=None, residual=None, dtype=None, launch=None, gated=False) -> torch.Tensor:
    """The kernel's result, over NaN; the last row of x and of the weights is followed by NaN, too."""
    rows = sum(weight.shape[0] for weight in weights[: 1 if gated else None])
    out = torch.full((x.shape[0], rows), torch.nan, dtype=dtype or x.dtype)
    x = torch.cat((x, torch.full_like(x[:1], torch.nan)))[:-1]
    weights = [torch.cat((weight, torch.full_like(weight[:1], torch.nan)))[:-1] for weight in weights]
    launch = launch or skinny_linear_launch(x.shape[1], x.shape[0], x.dtype, gated)
    _launch(x, weights, biases, norm, residual, out, launch, gated)
    return out


@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize("n", [1, 2, 5, 16])
@pytest.mark.parametrize("k", [64, 100, 192])
def test_one_weight(n: int, k: int, dtype: torch.dtype) -> None:
    for m in (33, 64, 7):
        x, weight = values(n, k, dtype=dtype), values(m, k, dtype=dtype, scale=k**-0.5)
        expected = skinny_linear_reference(x, (weight,))
        torch.testing.assert_close(run(x, (weight,)), expected, **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize("sizes", [(33, 7), (33, 64, 7), (1, 1, 20), (16, 32, 16)])
@pytest.mark.parametrize("count", [0, 1, 2])
def test_several_weights_with_everything(sizes: tuple[int, ...], count: int, dtype: torch.dtype) -> None:
    n, k = (1, 5, 16)[count], (64, 100, 192)[count]
    x = values(n, k, dtype=dtype)
    weights = [values(m, k, dtype=dtype, scale=k**-0.5) for m in sizes]
    biases = [None if i == count else values(m, dtype=dtype) for i, m in enumerate(sizes)]
    norm = (values(k, dtype=dtype), 1e-5)
    residual = values(n, sum(sizes), dtype=dtype)
    for arguments in ({"biases": biases}, {"norm": norm}, {"biases": biases, "norm": norm, "residual": residual}):
        expected = skinny_linear_reference(x, weights, **arguments)
        torch.testing.assert_close(run(x, weights, **arguments), expected, **TOLERANCE[dtype])


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("n", "m", "k"), [(1, 33, 100), (5, 64, 576), (16, 7, 64)])
def test_float32_result_of_float16_weights(n: int, m: int, k: int, normed: bool) -> None:
    x, weight = values(n, k, dtype=F16), values(m, k, dtype=F16, scale=k**-0.5)
    norm = (values(k, dtype=F16), 1e-5) if normed else None
    expected = skinny_linear_reference(x, (weight,), None, norm, out=torch.empty(n, m))
    # Products of float16 are exact in float32; x through RMSNorm is rounded once.
    tolerance = TOLERANCE[F16 if normed else F32]
    torch.testing.assert_close(run(x, (weight,), norm=norm, dtype=F32), expected, **tolerance)


@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("n", "m", "k"), [(1, 33, 100), (2, 7, 64), (5, 64, 576), (16, 33, 64)])
def test_gated(n: int, m: int, k: int, normed: bool, dtype: torch.dtype) -> None:
    x, norm = values(n, k, dtype=dtype), (values(k, dtype=dtype), 1e-5) if normed else None
    gate, up = (values(m, k, dtype=dtype, scale=k**-0.5) for _ in range(2))
    expected = gated_linear_reference(x, gate, up, norm)
    torch.testing.assert_close(run(x, (gate, up), norm=norm, gated=True), expected, **TOLERANCE[dtype])


@pytest.mark.parametrize(
    "launch",
    [
        SkinnyLinearLaunch(False, 1, 1, 128, 4, 1),
        SkinnyLinearLaunch(False, 1, 8, 64, 2, 3),
        SkinnyLinearLaunch(True, 16, 32, 64, 4, 3),
        SkinnyLinearLaunch(True, 8, 16, 256, 1, 2),
    ],
)
def test_every_launch(launch: SkinnyLinearLaunch) -> None:
    x, norm = values(3, 300, dtype=F16), (values(300, dtype=F16), 1e-5)
    weights = [values(m, 300, dtype=F16, scale=0.05) for m in (40, 9, 33)]
    expected = skinny_linear_reference(x, weights, None, norm)
    torch.testing.assert_close(run(x, weights, norm=norm, launch=launch), expected, **TOLERANCE[F16])


@pytest.mark.parametrize("dtype", [F32, F16])
def test_same_bits_in_every_batch(dtype: torch.dtype) -> None:
    x, norm = values(16, 576, dtype=dtype), (values(576, dtype=dtype), 1e-5)
    weights = [values(m, 576, dtype=dtype, scale=0.05) for m in (20, 7)]
    together = run(x, weights, norm=norm)
    for n in (1, 8, 9):
        assert torch.equal(run(x[:n], weights, norm=norm), together[:n])


def test_float16_whose_product_with_the_norm_weight_overflows() -> None:
    x, norm = values(2, 64, dtype=F16, scale=9000.0), (torch.full((64,), 60.0, dtype=F16), 1e-5)
    weights = [values(20, 64, dtype=F16, scale=0.1)]
    expected = skinny_linear_reference(x, weights, None, norm)
    assert expected.isfinite().all()
    torch.testing.assert_close(run(x, weights, norm=norm), expected, rtol=2e-3, atol=0.1)


def test_the_residual_may_be_the_result() -> None:
    x, weight, residual = values(3, 64, dtype=F32), values(33, 64, dtype=F32), values(3, 33, dtype=F32)
    expected = skinny_linear_reference(x, (weight,), None, None, residual)
    launch = skinny_linear_launch(64, 3, F32)
    _launch(x, (weight,), None, None, residual, residual, launch, gated=False)
    torch.testing.assert_close(residual, expected, **TOLERANCE[F32])
