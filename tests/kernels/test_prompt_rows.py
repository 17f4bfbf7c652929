"""A prompt's queries and rows: as transformers makes them, each in its place and nothing beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from prompt_rows_case import make_case
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

from ds_offload.kernels.prompt_rows import prompt_rows, prompt_rows_reference

TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.float16: {"rtol": 4e-3, "atol": 4e-3},
    torch.bfloat16: {"rtol": 3e-2, "atol": 3e-2},
}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("tokens", "kv_heads", "group", "dim"), [(1, 1, 1, 2), (19, 3, 2, 64), (5, 2, 5, 12)])
def test_heads_are_transformers_heads(
    tokens: int, kv_heads: int, group: int, dim: int, normed: bool, dtype: torch.dtype
) -> None:
    case = make_case(tokens, kv_heads, group, dim, normed, dtype)
    prompt_rows(*case.arguments)
    query, key, value = (part.view(tokens, -1, dim) for part in (case.query, case.key, case.value))
    if case.norms is not None:
        norms = [Qwen3RMSNorm(dim, case.norms.eps) for _ in range(2)]
        for norm, weight in zip(norms, (case.norms.query, case.norms.key), strict=True):
            norm.weight = torch.nn.Parameter(weight, requires_grad=False)
        query, key = norms[0](query), norms[1](key)
    query, key = apply_rotary_pos_emb(query, key, *case.rope)
    tolerance = {name: n * (4 if normed else 1) for name, n in TOLERANCE[dtype].items()}
    torch.testing.assert_close(case.queries, query, **tolerance)
    torch.testing.assert_close(case.rows[:, :, 0], key.transpose(0, 1), **tolerance)
    assert torch.equal(case.rows[:, :, 1], value.transpose(0, 1))
    assert case.staging[:, :3].isnan().all() and case.staging[:, 3 + tokens :].isnan().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: {"query": c.query[:, 1:]}, "query"),
        (lambda c: {"key": c.key.t().contiguous().t()}, "contiguous"),
        (lambda c: {"value": c.value.half()}, "one dtype"),
        (lambda c: {"rope": (c.rope[0], c.rope[1][:-1])}, "sin"),
        (lambda c: {"queries": c.queries.flatten(1)}, "queries"),
        (lambda c: {"rows": c.rows.transpose(0, 1)}, "rows"),
    ],
)
def test_what_does_not_fit_is_refused(change: Callable, message: str) -> None:
    case = make_case(5, 2, 2, 4, False)
    with pytest.raises(ValueError, match=message):
        prompt_rows(*replace(case, **change(case)).arguments)


def test_the_kernel_interpreted(interpret: Callable[[str], None]) -> None:
    interpret("interpreted_prompt_rows.py")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(
    ("tokens", "kv_heads", "group", "dim"), [(1, 1, 1, 2), (19, 3, 2, 64), (5, 2, 5, 12), (2176, 8, 4, 128)]
)
def test_on_a_gpu(tokens: int, kv_heads: int, group: int, dim: int, normed: bool, dtype: torch.dtype) -> None:
    ours, theirs = (make_case(tokens, kv_heads, group, dim, normed, dtype, "cuda") for _ in range(2))
    prompt_rows(*ours.arguments)
    prompt_rows_reference(*theirs.arguments)
    torch.testing.assert_close(ours.queries, theirs.queries, **TOLERANCE[dtype])
    torch.testing.assert_close(ours.staging, theirs.staging, **TOLERANCE[dtype], equal_nan=True)
