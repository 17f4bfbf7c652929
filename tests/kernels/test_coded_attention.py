"""Attention over a window and quantised rows, against the rows they stand for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from coded_attention_case import CodedCase, make_case

from ds_offload.kernels.coded_attention import coded_attention, coded_attention_launch, coded_attention_reference
from ds_offload.kernels.kv_codec import RowCode, RowLayout, decode_rows_reference

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
TOLERANCE = {F32: {"rtol": 1e-4, "atol": 1e-4}, F16: {"rtol": 5e-3, "atol": 5e-3}, BF16: {"rtol": 3e-2, "atol": 3e-2}}


def naive(case: CodedCase) -> torch.Tensor:
    """Row by row, float64."""
    window = case.window.shape[2]
    by_head = RowCode(case.code.layout, case.code.factor[:, None])
    shape = (*case.rows.shape[:-1], case.query.shape[-1])
    rows = decode_rows_reference(case.rows, by_head, torch.empty(shape, device=case.rows.device)).double()
    out = torch.empty(case.query.shape, dtype=torch.float64, device=case.query.device)
    group = case.query.shape[1] // case.rows.shape[1]
    for b in range(len(out)):
        for head in range(out.shape[1]):
            h = head // group
            listed = case.slots[b, h].tolist()
            near = [case.window[b, h, slot].double() for slot in listed[:window] if slot >= 0]
            chosen = torch.stack(near + [rows[b, h, slot] for slot in listed[window:] if slot >= 0])
            weights = (0.2 * chosen[:, 0] @ case.query[b, head].double()).softmax(0)
            out[b, head] = weights @ chosen[:, 1]
    return out


@pytest.mark.parametrize("attend", [coded_attention, coded_attention_reference])
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize(("bits", "dim"), [(8, 64), (8, 80), (4, 20), (4, 128)])
def test_against_the_rows_they_stand_for(attend: Any, dtype: torch.dtype, bits: int, dim: int) -> None:
    for group, window, count in ((1, 3, 0), (1, 5, 1), (3, 9, 70)):
        case = make_case(bits, dim, 2, group, window, count, dtype)
        torch.testing.assert_close(attend(**case.arguments()).double(), naive(case), **TOLERANCE[dtype])


def test_rows_of_a_store_give_the_bits_of_the_same_rows_in_a_tensor() -> None:
    case = make_case(4, 32, 2, 2, 4, 60, F32)
    assert torch.equal(coded_attention(**case.arguments(rows=case.stored(16))), coded_attention(**case.arguments()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": torch.zeros(2, 2, 4, 2, 30)}, "window"),
        ({"window": torch.zeros(2, 3, 4, 2, 32)}, "multiple of the window's 3 KV heads"),
        ({"rows": torch.zeros(2, 2, 9, 2, 32)}, "must be uint8"),
        ({"rows": torch.zeros(2, 2, 9, 2, 16, dtype=torch.uint8)}, "2 x 24 bytes"),
        ({"slots": torch.zeros(2, 2, 3, dtype=torch.int64)}, "name the window's 4 rows"),
        ({"slots": torch.zeros(2, 2, 12)}, "must be int64"),
        ({"slots": torch.full((2, 2, 12), 70)}, "slot 70 is beyond the 4 rows"),
        ({"out": torch.zeros(2, 4, 32).half()}, "out"),
    ],
)
def test_arguments_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    case = make_case(4, 32, 2, 2, 4, 9, F32)
    with pytest.raises(ValueError, match=message):
        coded_attention(**case.arguments(**changes))


@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize(("group", "dim"), [(1, 16), (1, 256), (4, 64), (4, 128), (17, 80)])
@pytest.mark.parametrize("bits", [4, 8])
def test_launches(bits: int, group: int, dim: int, dtype: torch.dtype) -> None:
    launch = coded_attention_launch(group, RowLayout(bits, dim), dtype)
    assert launch.split % launch.tile == 0 and launch.tile & (launch.tile - 1) == 0
    assert launch.tensor_cores == (group > 1 and dtype is F16)


def test_triton_kernels_in_the_interpreter(interpret: Callable[[str], None]) -> None:
    interpret("interpreted_coded_attention.py")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("dim", [16, 20, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("bits", [8, 4])
def test_cuda(bits: int, dim: int, dtype: torch.dtype) -> None:
    for kv_heads, group, window, count in ((2, 1, 5, 0), (3, 1, 69, 1000), (2, 4, 69, 1000), (1, 20, 4, 300)):
        case = make_case(bits, dim, kv_heads, group, window, count, dtype, "cuda")
        torch.testing.assert_close(coded_attention(**case.arguments()).double(), naive(case), **TOLERANCE[dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("bits", [8, 4])
def test_cuda_same_bits_wherever_rows_stand_in_every_batch_and_out_of_a_store(bits: int, group: int) -> None:
    case = make_case(bits, 128, 2, group, 4, 3000, BF16, "cuda")
    out = coded_attention(**case.arguments())
    padded = torch.cat((case.slots, torch.full((2, 2, 2000), -1, device="cuda")), -1)
    assert torch.equal(coded_attention(**case.arguments(slots=padded)), out)
    order = torch.randperm(case.rows.shape[2], generator=torch.Generator().manual_seed(0)).cuda()
    far = case.slots[..., 4:]
    moved = torch.cat((case.slots[..., :4], torch.where(far >= 0, order.argsort()[far], -1)), -1)
    assert torch.equal(coded_attention(**case.arguments(rows=case.rows[:, :, order], slots=moved)), out)
    assert torch.equal(coded_attention(**case.arguments(rows=case.stored(64))), out)
    for b in (0, 1):
        one = slice(b, b + 1)
        parts = {name: getattr(case, name)[one] for name in ("query", "window", "rows", "slots")}
        assert torch.equal(coded_attention(**case.arguments(**parts))[0], out[b])
