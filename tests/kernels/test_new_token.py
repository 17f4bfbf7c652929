"""The new token: RoPE, rows, window slot and label against transformers and the label code."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from new_token_case import POSITIONS, RING, SINKS, assert_close_labels, make_case
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

from ds_offload.kernels.label_codec import encode_labels
from ds_offload.kernels.new_token import (
    HeadNorms,
    WindowRows,
    new_token,
    new_token_reference,
    rotate_heads,
)

TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.float16: {"rtol": 2e-3, "atol": 2e-3},
    torch.bfloat16: {"rtol": 1.6e-2, "atol": 1.6e-2},
}


def transformers_heads(case, kv_heads: int, dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v as transformers computes them."""
    heads = case.projected.view(len(POSITIONS), -1, dim)
    count = heads.shape[1] - 2 * kv_heads
    query, key, value = heads.split((count, kv_heads, kv_heads), 1)
    if case.norms is not None:
        norms = [Qwen3RMSNorm(dim, case.norms.eps) for _ in range(2)]
        for norm, weight in zip(norms, (case.norms.query, case.norms.key), strict=True):
            norm.weight = torch.nn.Parameter(weight, requires_grad=False)
        query, key = norms[0](query), norms[1](key)
    query, key = apply_rotary_pos_emb(query, key, *case.rope)
    return query, key, value


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("kv_heads", "group", "dim"), [(1, 1, 2), (3, 2, 64), (2, 5, 12)])
def test_heads_are_transformers_heads(kv_heads: int, group: int, dim: int, normed: bool, dtype: torch.dtype) -> None:
    case = make_case(kv_heads, group, dim, None, normed, False, dtype)
    query, key, value = transformers_heads(case, kv_heads, dim)
    tolerance = TOLERANCE[dtype] if not normed else {name: 4 * n for name, n in TOLERANCE[dtype].items()}
    torch.testing.assert_close(new_token(*case.arguments, norms=case.norms), query, **tolerance)
    torch.testing.assert_close(case.kv_rows[:, :, 0], key, **tolerance)
    assert torch.equal(case.kv_rows[:, :, 1], value)


def test_the_window_slot_gets_the_row_and_no_other_does() -> None:
    case = make_case(3, 2, 64, None, False, True, rows_dtype=torch.float16)
    new_token(*case.arguments, window=case.window)
    for b, position in enumerate(POSITIONS):
        slot = position if position < SINKS else SINKS + position % RING
        assert torch.equal(case.window.rows[b, :, slot], case.kv_rows[b])
        case.window.rows[b, :, slot] = torch.nan
    assert case.window.rows.isnan().all()


@pytest.mark.parametrize("bits", [16, 8, 4, 2])
def test_the_label_is_that_of_the_rotated_key(bits: int) -> None:
    case = make_case(3, 2, 64, bits, False, False)
    new_token(*case.arguments, labels=case.labels)
    labels = case.labels
    kept = case.kv_rows[:, :, 0].gather(-1, labels.channels.expand(len(POSITIONS), -1, -1)) - labels.mean
    written = torch.zeros_like(labels.rows)
    for b, position in enumerate(POSITIONS):
        written[:, labels.starts[b] + position] = encode_labels(kept[b], labels.layout)
    assert torch.equal(labels.rows, written) and written.any()


@pytest.mark.parametrize("normed", [False, True])
def test_rotated_heads_have_the_bits_of_the_new_token(normed: bool) -> None:
    case = make_case(3, 2, 64, None, normed, False, torch.bfloat16)
    query = new_token(*case.arguments, norms=case.norms)
    heads = case.projected.view(len(POSITIONS), -1, 64)[:, :6]
    norm = (case.norms.query, case.norms.eps) if case.norms is not None else ()
    assert torch.equal(rotate_heads(heads, case.rope, *norm), query)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"projected": torch.zeros(3, 100)}, "holds .* query heads"),
        ({"projected": torch.zeros(2, 4 * 64)}, r"must be \[3,"),
        ({"rope": (torch.zeros(3, 32), torch.zeros(3, 32))}, r"cos \(3, 32\) must be \[3, 64\]"),
        ({"positions": torch.zeros(3, dtype=torch.int32)}, "positions torch.int32"),
        ({"kv_rows": torch.zeros(3, 1, 64)}, "kv_rows"),
        ({"window": WindowRows(torch.zeros(3, 1, 5, 2, 64), 2, 4)}, "2 sinks and a ring of 4"),
        ({"window": WindowRows(torch.zeros(3, 1, 9, 2, 64).half(), 2, 4)}, "must be torch.float32"),
    ],
)
def test_wrong_arguments_are_named(change: dict, message: str) -> None:
    case = make_case(1, 2, 64, None, False, False)
    arguments = {"projected": case.projected, "rope": case.rope, "positions": case.positions, "kv_rows": case.kv_rows}
    new_token(**arguments)
    with pytest.raises(ValueError, match=message):
        new_token(**(arguments | change))


def test_triton_kernels_in_the_interpreter(interpret: Callable[[str], None]) -> None:
    interpret("interpreted_new_token.py")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("kv_heads", "group", "dim", "bits", "normed"),
    [
        (1, 1, 2, 16, True),
        (32, 1, 128, 2, False),
        (8, 4, 128, 2, True),
        (8, 4, 128, None, False),
        (3, 3, 64, 2, False),
        (3, 3, 64, 4, True),
        (2, 5, 80, 8, False),
    ],
)
def test_cuda(kv_heads: int, group: int, dim: int, bits: int | None, normed: bool, dtype: torch.dtype) -> None:
    ours, theirs = (make_case(kv_heads, group, dim, bits, normed, True, dtype, "cuda") for _ in range(2))
    torch.cuda.set_sync_debug_mode("error")
    try:
        query = new_token(*ours.arguments, norms=ours.norms, window=ours.window, labels=ours.labels)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = new_token_reference(*theirs.arguments, norms=theirs.norms, window=theirs.window, labels=theirs.labels)
    torch.testing.assert_close(query, expected, **TOLERANCE[dtype])
    torch.testing.assert_close(ours.kv_rows, theirs.kv_rows, **TOLERANCE[dtype])
    torch.testing.assert_close(ours.window.rows, theirs.window.rows, **TOLERANCE[dtype], equal_nan=True)
    if bits is not None:
        assert_close_labels(ours.labels, theirs.labels)
    heads = ours.projected.view(len(POSITIONS), -1, dim)[:, : kv_heads * group]
    norm = (ours.norms.query, ours.norms.eps) if isinstance(ours.norms, HeadNorms) else ()
    assert torch.equal(rotate_heads(heads, ours.rope, *norm), query)
