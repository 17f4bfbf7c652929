"""The Triton kernels of coded attention on CPU tensors; run by test_coded_attention.py under TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch
from coded_attention_case import CodedCase, make_case

from ds_offload.kernels import coded_attention
from ds_offload.kernels.coded_attention import _launch, coded_attention_reference
from ds_offload.kernels.slot_attention_launch import SlotAttentionLaunch

F32, F16 = torch.float32, torch.float16
TOLERANCE = {F32: {"rtol": 1e-5, "atol": 2e-5}, F16: {"rtol": 5e-3, "atol": 5e-3}}


def run(case: CodedCase, **changes: torch.Tensor) -> torch.Tensor:
    query, *rest = (changes.get(name, value) for name, value in case.arguments().items())
    out = torch.full_like(query, torch.nan)
    _launch(query, *rest, out)
    return out


# Groups of float32 are so many single heads: of one size.
KINDS = [(1, F32), (1, F16), (3, F16), (17, F16)]
SIZES = [(8, 16), (4, 20), (4, 80)]


@pytest.mark.parametrize(
    ("group", "dtype", "bits", "dim"), [*(kind + size for kind in KINDS for size in SIZES), (3, F32, 8, 16)]
)
def test_kernels_equal_the_reference(group: int, dtype: torch.dtype, bits: int, dim: int) -> None:
    for window, count in ((3, 0), (5, 1), (9, 150), (150, 20)):
        case = make_case(bits, dim, 2, group, window, count, dtype)
        torch.testing.assert_close(run(case), coded_attention_reference(**case.arguments()), **TOLERANCE[dtype])


@pytest.mark.parametrize("tensor_cores", [False, True])
def test_splits_without_a_slot(tensor_cores: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = SlotAttentionLaunch(tensor_cores, 16 if tensor_cores else 1, split=16, tile=16, warps=4, stages=1)
    monkeypatch.setattr(coded_attention, "coded_attention_launch", lambda *args: launch)
    case = make_case(4, 32, 1, 2, 5, 100, F32)
    case.slots[0, 0, 5:60] = -1
    case.slots[1, 0, :5] = -1
    torch.testing.assert_close(run(case), coded_attention_reference(**case.arguments()), **TOLERANCE[F32])


@pytest.mark.parametrize(("group", "dtype"), [(1, F32), (2, F16)])
def test_same_bits_wherever_rows_stand_in_every_batch_and_out_of_a_store(group: int, dtype: torch.dtype) -> None:
    case = make_case(4, 32, 2, group, 4, 140, dtype)
    out = run(case)
    padded = torch.cat((case.slots, torch.full((2, 2, 200), -1)), -1)
    assert torch.equal(run(case, slots=padded), out)
    order = torch.randperm(case.rows.shape[2], generator=torch.Generator().manual_seed(0))
    far = case.slots[..., 4:]
    moved = torch.where(far >= 0, order.argsort()[far], -1)
    assert torch.equal(run(case, rows=case.rows[:, :, order], slots=torch.cat((case.slots[..., :4], moved), -1)), out)
    for b in (0, 1):
        one = slice(b, b + 1)
        alone = run(case, query=case.query[one], window=case.window[one], rows=case.rows[one], slots=case.slots[one])
        assert torch.equal(alone[0], out[b])
    assert torch.equal(run(case, rows=case.stored(16)), out)
