"""K/V rows at 8 and 4 bits: the bytes, the way there and back against float64, and CUDA."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from kv_code_case import make_code, make_rows, round_trip64

from ds_offload.kernels.kv_codec import RowCode, RowLayout, decode_rows, encode_rows

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DIMS = (16, 20, 64, 80, 96, 128, 256)


@pytest.mark.parametrize(
    ("bits", "dim", "row_bytes"),
    [
        *((8, 64, 144), (8, 80, 176), (8, 128, 272), (8, 256, 528), (8, 2, 32), (4, 20, 48)),
        *((4, 64, 80), (4, 80, 96), (4, 96, 112), (4, 128, 144), (4, 256, 272)),
    ],
)
def test_row_bytes(bits: int, dim: int, row_bytes: int) -> None:
    assert RowLayout(bits, dim).row_bytes == row_bytes
    assert row_bytes % 16 == 0


@pytest.mark.parametrize(("bits", "dim"), [(2, 64), (16, 64), (4, 63), (8, 0)])
def test_layouts_that_do_not_exist(bits: int, dim: int) -> None:
    with pytest.raises(ValueError, match="bits must be 8 or 4, and the head dim even"):
        RowLayout(bits, dim)


def test_the_bytes_of_a_row() -> None:
    """Written out: two halves of K over its factors, two of V."""
    code = RowCode(RowLayout(4, 4), torch.tensor([2.0, 1, 1, 1]))
    row = torch.tensor([[0.0, 15, 30, 0], [-1, -1, 0, 7.5]])[None]
    coded = encode_rows(row, code)[0]
    assert coded.shape == (2, 16)
    # Channels 0 and 1 are 0 and 15: codes 0 and 15. Channels 2 and 3 are 30 and 0: codes 15 and 0.
    assert coded[0, :2].tolist() == [0x0 | 0xF0, 0xF | 0x00]
    assert coded[0, 2:8].eq(0).all(), "bytes between"
    assert coded[0, 8:].view(F16).tolist() == [7.5, 1, 15, 2]
    # A half whose channels are equal has no step, and a code in the middle.
    assert coded[1, 8:].view(F16).tolist() == [-1, 0, 3.75, 0.5]
    assert coded[1, :2].tolist() == [8 | 0x00, 8 | 0xF0]
    assert torch.equal(decode_rows(coded[None], code, torch.empty(1, 2, 4)), row)


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("bits", [8, 4])
def test_there_and_back_against_float64(bits: int, dim: int, dtype: torch.dtype) -> None:
    for count in (1, 7, 600):
        code = make_code(bits, dim, 2, 1)
        rows = make_rows(code, (2, count), dtype)
        back = decode_rows(encode_rows(rows, code), code, torch.full(rows.shape, torch.nan))
        expected, bound = round_trip64(rows, code)
        error = (back - rows.double()).abs()
        assert (error <= bound * 1.001 + 1e-6).all()
        # A value on the border of two codes may fall on either side.
        close = torch.isclose(back.double(), expected, rtol=1e-5, atol=1e-5)
        # A code may be one off where the rounding of its step decides.
        assert close.double().mean() > 0.995


def test_codes_by_layer_and_head_and_strided_rows() -> None:
    """The new rows of all layers [L, B, Hkv, 2, D] equal each layer's and head's alone."""
    code = make_code(4, 16, 3, 1, 2)
    rows = make_rows(code, (3, 5, 2), F32)
    wide = torch.zeros(3, 5, 4, 2, 16)
    wide[:, :, ::2] = rows
    coded = encode_rows(wide[:, :, ::2], code)
    for layer in range(3):
        for head in range(2):
            alone = RowCode(code.layout, code.factor[layer, 0, head])
            assert torch.equal(coded[layer, :, head], encode_rows(rows[layer, :, head], alone))


@pytest.mark.parametrize("bits", [8, 4])
def test_far_and_tiny_values(bits: int) -> None:
    """Beyond float16's range values saturate, and steps too small for it vanish; nothing becomes NaN."""
    code = RowCode(RowLayout(bits, 4), torch.ones(4))
    rows = torch.tensor([[1e9, -1e9, 1e-9, 2e-9], [0, 0, 65504, 65000]])
    back = decode_rows(encode_rows(rows[None], code), code, torch.empty(1, 2, 4))[0]
    assert back.isfinite().all()
    assert back[0, 0] > 6e4 and back[0, 1] < -6e4
    torch.testing.assert_close(back[0, 2:], rows[0, 2:], rtol=0, atol=1e-7)
    torch.testing.assert_close(back[1], rows[1], rtol=1e-3, atol=0)


def test_shapes_that_do_not_fit() -> None:
    code = make_code(8, 16)
    with pytest.raises(ValueError, match=r"must be .*2, 16"):
        encode_rows(torch.zeros(3, 2, 20), code)
    with pytest.raises(ValueError, match="does not hold coded rows"):
        decode_rows(torch.zeros(3, 2, 24, dtype=torch.uint8), code, torch.zeros(4, 2, 16))


def test_triton_kernels_in_the_interpreter(interpret: Callable[[str], None]) -> None:
    interpret("interpreted_kv_codec.py")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("bits", [8, 4])
def test_cuda(bits: int, dim: int, dtype: torch.dtype) -> None:
    for count in (1, 7, 1031):
        code = make_code(bits, dim, 2, 1, device="cuda")
        rows = make_rows(code, (2, count), dtype, "cuda")
        expected, bound = round_trip64(rows, code)
        coded = encode_rows(rows, code)
        back = decode_rows(coded, code, torch.full_like(rows, torch.nan, dtype=F32))
        assert ((back - rows.double()).abs() <= bound * 1.001 + 1e-6).all()
        close = torch.isclose(back.double(), expected, rtol=1e-5, atol=1e-5)
        # A code may be one off where the rounding of its step decides.
        assert close.double().mean() > 0.995
        on_cpu = RowCode(code.layout, code.factor.cpu())
        there = decode_rows(coded.cpu(), on_cpu, torch.empty(rows.shape))
        torch.testing.assert_close(back.cpu(), there, rtol=1e-6, atol=1e-6)


@pytest.mark.gpu
def test_cuda_strided_rows_of_three_dimensions() -> None:
    code = make_code(4, 80, 3, 1, 2, device="cuda")
    rows = make_rows(code, (3, 5, 2), BF16, "cuda")
    wide = torch.zeros(3, 5, 4, 2, 80, dtype=BF16, device="cuda")
    wide[:, :, ::2] = rows
    assert torch.equal(encode_rows(wide[:, :, ::2], code), encode_rows(rows, code))


@pytest.mark.gpu
@pytest.mark.slow
def test_cuda_beyond_two_gib() -> None:
    """Addresses of 64 bits: 4 GiB of rows."""
    code = make_code(8, 128, 1, 1, device="cuda")
    rows = torch.zeros(1, 9_000_000, 2, 128, dtype=BF16, device="cuda")
    rows[0, -3:] = make_rows(code, (1, 3), BF16, "cuda")[0]
    coded = encode_rows(rows, code)
    assert torch.equal(coded[:, -3:], encode_rows(rows[:, -3:], code))
