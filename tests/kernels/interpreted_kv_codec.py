"""The Triton kernels of the row codec on CPU tensors; run by test_kv_codec.py under TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch
from kv_code_case import make_code, make_rows

from ds_offload.kernels.kv_codec import (
    RowCode,
    _coded_like,
    _launch,
    decode_rows_reference,
    encode_rows_reference,
)
from ds_offload.kernels.kv_codec_kernels import decode_kernel, encode_kernel

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


def encode(rows: torch.Tensor, code: RowCode) -> torch.Tensor:
    out = _coded_like(rows, code.layout)
    _launch(encode_kernel, rows, out, code)
    return out


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("dim", [16, 20, 80, 128])
@pytest.mark.parametrize("bits", [8, 4])
def test_kernels_equal_the_reference(bits: int, dim: int, dtype: torch.dtype) -> None:
    for shape, lead in (((2, 21), (2, 1)), ((3, 2, 5), (3, 1, 5)), ((9,), (1,))):
        code = make_code(bits, dim, *lead)
        rows = make_rows(code, shape, dtype)
        coded = encode(rows, code)
        expected = encode_rows_reference(rows, code)
        # A value on the border of two codes may fall on either side.
        assert (coded == expected).double().mean() > 0.99
        back = torch.full(rows.shape, torch.nan, dtype=F32)
        _launch(decode_kernel, back, coded, code)
        torch.testing.assert_close(back, decode_rows_reference(coded, code, torch.empty(rows.shape)))


@pytest.mark.parametrize("bits", [8, 4])
def test_strided_rows_and_a_part_of_a_buffer(bits: int) -> None:
    code = make_code(bits, 20, 2, 1)
    rows = make_rows(code, (2, 33), F32)
    wide = torch.full((2, 50, 2, 20), torch.nan)
    wide[:, 5:38] = rows
    coded = encode(wide[:, 5:38], code)
    assert torch.equal(coded, encode(rows, code))
    back = torch.full((2, 50, 2, 20), torch.nan)
    _launch(decode_kernel, back[:, 5:38], coded, code)
    assert back.isfinite().sum() == rows.numel()
    torch.testing.assert_close(back[:, 5:38], decode_rows_reference(coded, code, torch.empty(rows.shape)))


def test_rows_without_a_spread() -> None:
    code = make_code(4, 16, 1)
    rows = torch.full((3, 2, 16), 7.0)
    rows[:, 0] = code.factor
    back = torch.empty(rows.shape)
    _launch(decode_kernel, back, encode(rows, code), code)
    torch.testing.assert_close(back, rows)
