"""Attention of whole prompts and of pieces against the float32 reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import ds_offload.prefill_attention as attention
from ds_offload.prefill_attention import (
    attention_with_lse,
    attention_with_lse_reference,
    causal_attention_,
    merge_,
    piece_attention_,
)

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
SHAPES = [(1, 1, 1, 16), (7, 4, 4, 16), (65, 6, 2, 24), (130, 4, 1, 64), (33, 3, 3, 128)]


def inputs(
    length: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length + heads)
    queries = torch.randn(length, heads, dim, generator=generator)
    rows = torch.randn(kv_heads, length, 2, dim, generator=generator)
    return queries.to(device, dtype), rows.to(device, dtype)


def grouped(queries: Tensor, kv_heads: int) -> Tensor:
    return queries.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)


def reference(queries: Tensor, rows: Tensor, scaling: float) -> Tensor:
    out, _ = attention_with_lse_reference(
        grouped(queries, len(rows)).float(), rows[:, :, 0], rows[:, :, 1], scaling, causal=True
    )
    return out.permute(2, 0, 1, 3).flatten(1, 2)


def check(out: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCE[out.dtype]
    torch.testing.assert_close(out.float(), expected, rtol=tolerance, atol=tolerance)


def check_all(length: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, device: str) -> None:
    """A whole prompt; log-sum-exps with and without a mask; a prompt in pieces of odd sizes."""
    queries, rows = inputs(length, heads, kv_heads, dim, dtype, device)
    expected = reference(queries, rows, 0.3)
    whole = queries.clone()
    causal_attention_(whole, rows, 0.3)
    check(whole, expected)
    for causal in (True, False):
        given = (grouped(queries, kv_heads), rows[:, :, 0], rows[:, :, 1], 0.3)
        out, lse = attention_with_lse(*given, causal=causal)
        expected_out, expected_lse = attention_with_lse_reference(*given, causal=causal)
        check(out, expected_out.float())
        torch.testing.assert_close(lse, expected_lse, rtol=1e-2, atol=1e-2)
    pieces = queries.clone()
    done: list[float] = []
    for start in range(0, length, 29):
        piece = slice(start, min(start + 29, length))
        earlier = (rows[:, first : min(first + 13, start)] for first in range(0, start, 13))
        piece_attention_(pieces[piece], rows[:, piece], earlier, 0.3, done.append)
    check(pieces, expected)
    assert sum(done) == heads * length * length / 2


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_the_reference(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    check_all(*shape, dtype, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*SHAPES, (5000, 8, 2, 128), (4096, 4, 4, 64), (4099, 8, 1, 96)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_against_the_reference_on_a_gpu(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    check_all(*shape, dtype, "cuda")
    assert not attention._cudnn_failed


@pytest.mark.gpu
def test_cudnn_is_tried_first_where_it_pays() -> None:
    queries, rows = inputs(4096, 8, 2, 128, torch.bfloat16, "cuda")
    given = (queries.transpose(0, 1)[None], rows[None, :, :, 0], rows[None, :, :, 1])
    assert attention._backend(*given, True) is attention.SDPBackend.CUDNN_ATTENTION
    short = given[0][:, :, :100]
    assert attention._backend(short, *given[1:], False) is attention.SDPBackend.FLASH_ATTENTION
    exact = tuple(part.float() for part in given)
    assert attention._backend(*exact, True) is attention.SDPBackend.EFFICIENT_ATTENTION


def test_a_long_prompt_on_a_cpu_is_attended_to_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "CPU_TOKENS", 20)
    queries, rows = inputs(65, 6, 2, 24)
    expected = reference(queries, rows, 0.2)
    done: list[float] = []
    causal_attention_(queries, rows, 0.2, done.append)
    check(queries, expected)
    assert len(done) == 1 + 2 + 3 + 4 and sum(done) == 6 * 65 * 65 / 2


def test_blocks_of_kv_heads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, rows = inputs(40, 6, 3, 16)
    whole = queries.clone()
    causal_attention_(whole, rows, 0.2)
    monkeypatch.setattr(attention, "CHUNK_BYTES", 1)
    causal_attention_(queries, rows, 0.2)
    assert torch.equal(queries, whole)


def test_what_weighs_nothing_changes_nothing() -> None:
    """Scores that are far below the others', and far above them."""
    total, lse = torch.ones(1, 1, 2, 4), torch.tensor([[[0.0, 200.0]]])
    merge_(total, lse, torch.full((1, 1, 2, 4), 5.0), torch.tensor([[[200.0, 0.0]]]))
    assert total[0, 0].tolist() == [[5.0] * 4, [1.0] * 4] and lse.tolist() == [[[200.0, 200.0]]]


def test_a_failure_of_cudnn_is_said_once_and_of_memory_is_raised(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(attention, "_cudnn_failed", False)
    with pytest.raises(torch.OutOfMemoryError):
        attention._give_up_cudnn(torch.OutOfMemoryError("no memory"))
    assert not attention._cudnn_failed
    attention._give_up_cudnn(RuntimeError("no plan\nfor this"))
    assert attention._cudnn_failed
    assert "cuDNN's attention failed (no plan): the prefill goes on with a slower kernel" in capsys.readouterr().err
