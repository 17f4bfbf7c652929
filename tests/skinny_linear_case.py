"""Skinny linear layers with odd sizes, and their results in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
# By the dtype of x and the weights, for results of order 1: a float32 result is as exact as what went in.
TOLERANCE = {F32: {"rtol": 2e-5, "atol": 2e-5}, F16: {"rtol": 2e-3, "atol": 4e-3}, BF16: {"rtol": 1.6e-2, "atol": 3e-2}}
EPS = 1e-5
Case = dict[str, Any]


def values(*shape: int, dtype: torch.dtype, device: str, scale: float = 1.0) -> torch.Tensor:
    return (scale * torch.randn(shape, device=device)).to(dtype)


def linear_case(
    n: int, sizes: Sequence[int], k: int, dtype: torch.dtype, device: str = "cpu", whole: bool = True
) -> Case:
    """Arguments of `skinny_linear`; `whole`: with every optional one, the last bias left out."""
    case: Case = {
        "x": values(n, k, dtype=dtype, device=device),
        "weights": tuple(values(m, k, dtype=dtype, device=device, scale=k**-0.5) for m in sizes),
    }
    if whole:
        case["biases"] = (*(values(m, dtype=dtype, device=device) for m in sizes[:-1]), None)
        case["norm"] = (values(k, dtype=dtype, device=device), EPS)
        case["residual"] = values(n, sum(sizes), dtype=dtype, device=device)
    return case


def gated_case(n: int, m: int, k: int, dtype: torch.dtype, device: str = "cpu", whole: bool = True) -> Case:
    case = linear_case(n, (m, m), k, dtype, device, whole)
    gate, up = case["weights"]
    return {"x": case["x"], "gate": gate, "up": up, "norm": case.get("norm")}


def naive(x, weights, biases=None, norm=None, residual=None) -> torch.Tensor:
    x = x.double()
    if norm is not None:
        x = x / (x.pow(2).mean(-1, keepdim=True) + norm[1]).sqrt() * norm[0].double()
    out = torch.cat([x @ weight.double().T for weight in weights], 1)
    for i, bias in enumerate(biases or ()):
        first = sum(weight.shape[0] for weight in weights[:i])
        if bias is not None:
            out[:, first : first + len(bias)] += bias.double()
    return out if residual is None else out + residual.double()


def naive_gated(x, gate, up, norm=None) -> torch.Tensor:
    first, second = naive(x, (gate, up), None, norm).chunk(2, 1)
    return first / (1 + (-first).exp()) * second


def assert_close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(actual, expected.to(actual.dtype), **TOLERANCE[dtype])
