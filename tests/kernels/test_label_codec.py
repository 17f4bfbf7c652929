"""The label code against its definition, read bit by bit in plain Python."""

from __future__ import annotations

import math

import pytest
import torch

from ds_offload.kernels import label_codec
from ds_offload.kernels.label_codec import LabelLayout, decode_labels, encode_labels

CHANNELS = (1, 3, 7, 28, 33, 60, 129)
BITS = (16, 8, 4, 2)
CODED = (8, 4, 2)


def keys_of(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3


def read_row(row: list[int], layout: LabelLayout) -> list[float]:
    """A row's values, from the format's description."""
    number = int.from_bytes(bytes(row[: layout.code_bytes]), "little")
    largest = 2**layout.bits - 1
    codes = [(number >> (channel * layout.bits)) & largest for channel in range(layout.channels)]
    scale = 2 ** ((row[-1] - 128) / 12)
    return [scale * (2 * code - largest) / largest for code in codes]


@pytest.mark.parametrize(
    ("channels", "bits", "row_bytes"),
    [
        (28, 2, 8),
        (29, 2, 12),
        (60, 2, 16),
        (1, 2, 4),
        (5, 2, 4),
        (14, 4, 8),
        (5, 4, 4),
        (3, 8, 4),
        (4, 16, 8),
        (1, 16, 4),
    ],
)
def test_row_bytes(channels: int, bits: int, row_bytes: int) -> None:
    assert LabelLayout(channels, bits).row_bytes == row_bytes


@pytest.mark.parametrize(("channels", "bits"), [(0, 2), (-1, 16), (4, 1), (4, 3), (4, 32)])
def test_layout_refuses(channels: int, bits: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        LabelLayout(channels, bits)


@pytest.mark.parametrize("bits", CODED)
@pytest.mark.parametrize("channels", CHANNELS)
def test_decode_reads_the_documented_format(channels: int, bits: int) -> None:
    layout = LabelLayout(channels, bits)
    rows = torch.randint(0, 256, (50, layout.row_bytes), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    expected = torch.tensor([read_row(row, layout) for row in rows.tolist()], dtype=torch.float64)
    torch.testing.assert_close(decode_labels(rows, layout).double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("bits", CODED)
@pytest.mark.parametrize("channels", CHANNELS)
def test_encode_takes_the_nearest_level_of_the_nearest_scale(channels: int, bits: int) -> None:
    layout = LabelLayout(channels, bits)
    keys = keys_of(40, channels)
    rows = encode_labels(keys, layout)
    largest = 2**bits - 1
    for key, row in zip(keys.tolist(), rows.tolist(), strict=True):
        step = 12 * math.log2((0.8 if bits == 2 else 1) * max(map(abs, key))) + 128
        assert abs(row[-1] - step) <= 0.5 + 1e-3
        scale = 2 ** ((row[-1] - 128) / 12)
        levels = [scale * (2 * code - largest) / largest for code in range(largest + 1)]
        for value, decoded in zip(key, read_row(row, layout), strict=True):
            assert abs(value - decoded) <= min(abs(value - level) for level in levels) + 1e-5 * scale
        rest = int.from_bytes(bytes(row[:-1]), "little") >> (channels * bits)
        assert rest == 0, "unused bits and padding must be zero"


@pytest.mark.parametrize("channels", CHANNELS)
def test_16_bit_rows_are_float16_values_and_zeros(channels: int) -> None:
    layout = LabelLayout(channels, 16)
    keys = keys_of(4, channels)
    rows = encode_labels(keys, layout, out=torch.full((4, layout.row_bytes), 0xA5, dtype=torch.uint8))
    assert torch.equal(rows[:, : 2 * channels].contiguous().view(torch.float16), keys.half())
    assert not rows[:, 2 * channels :].any()


# Root mean square error over that of Gaussian keys: what a code is worth, with a tenth to spare.
ERRORS = {16: 4e-4, 8: 0.009, 4: 0.095, 2: 0.4}


@pytest.mark.parametrize("bits", BITS)
def test_round_trip_error(bits: int) -> None:
    layout = LabelLayout(28, bits)
    keys = keys_of(2000, 28)
    decoded = decode_labels(encode_labels(keys, layout), layout)
    assert ((decoded - keys).square().mean() / keys.square().mean()).sqrt() < ERRORS[bits]


@pytest.mark.parametrize("bits", CODED)
def test_zero_row_decodes_to_about_zero(bits: int) -> None:
    layout = LabelLayout(5, bits)
    rows = encode_labels(torch.zeros(2, 5), layout)
    assert rows[:, -1].tolist() == [0, 0]
    assert decode_labels(rows, layout).abs().max() <= 2 ** (-128 / 12) * 1.00001


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("magnitude", [1e-30, 1e30])
def test_values_beyond_the_range_keep_their_sign(bits: int, magnitude: float) -> None:
    layout = LabelLayout(2, bits)
    decoded = decode_labels(encode_labels(torch.tensor([[magnitude, -magnitude]]), layout), layout)
    assert decoded.isfinite().all()
    if magnitude > 1:
        assert decoded[0, 0] > 1000 and decoded[0, 1] < -1000
    else:
        assert decoded.abs().max() < 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bits", BITS)
def test_every_float_dtype_is_encoded_as_float32(bits: int, dtype: torch.dtype) -> None:
    layout = LabelLayout(7, bits)
    keys = keys_of(20, 3, 7).to(dtype)
    assert torch.equal(encode_labels(keys, layout), encode_labels(keys.float(), layout))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (5,), (11, 3), (2, 4, 3)])
def test_any_leading_shape(bits: int, shape: tuple[int, ...]) -> None:
    layout = LabelLayout(6, bits)
    keys = keys_of(*shape, 6)
    rows = encode_labels(keys, layout)
    assert rows.shape == (*shape, layout.row_bytes)
    assert decode_labels(rows, layout).shape == keys.shape
    flat = encode_labels(keys.reshape(-1, 6), layout)
    assert torch.equal(rows.reshape(-1, layout.row_bytes), flat)


@pytest.mark.parametrize("bits", BITS)
def test_writes_only_a_strided_view(bits: int) -> None:
    layout = LabelLayout(5, bits)
    keys = keys_of(4, 3, 5)
    cache = torch.full((3, 10, layout.row_bytes), 0xA5, dtype=torch.uint8)
    view = cache[:, 2:6].transpose(0, 1)
    assert encode_labels(keys, layout, out=view) is view
    assert torch.equal(view, encode_labels(keys, layout)), "padding must be written"
    assert (cache[:, :2] == 0xA5).all() and (cache[:, 6:] == 0xA5).all()


@pytest.mark.parametrize("bits", BITS)
def test_chunks_change_nothing(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = LabelLayout(5, bits)
    keys = keys_of(11, 3, 5)
    whole = encode_labels(keys, layout)
    for elements in (1, 31):
        monkeypatch.setattr(label_codec, "CHUNK_ELEMENTS", elements)
        assert torch.equal(encode_labels(keys, layout), whole)


def test_wrong_arguments_are_named() -> None:
    layout = LabelLayout(4, 2)
    with pytest.raises(ValueError, match=r"keys .* must be floating point \[\.\.\., 4\]"):
        encode_labels(torch.zeros(3, 5), layout)
    with pytest.raises(ValueError, match="floating point"):
        encode_labels(torch.zeros(3, 4, dtype=torch.int64), layout)
    with pytest.raises(ValueError, match="out "):
        encode_labels(torch.zeros(3, 4), layout, out=torch.zeros(3, 2, dtype=torch.uint8))
    with pytest.raises(ValueError, match="rows "):
        decode_labels(torch.zeros(3, 2, dtype=torch.uint8), layout)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", BITS)
def test_cuda_encodes_as_the_cpu_without_waiting(bits: int) -> None:
    layout = LabelLayout(28, bits)
    keys = keys_of(5000, 2, 28)
    on_device = keys.cuda()
    out = torch.zeros(5000, 2, layout.row_bytes, dtype=torch.uint8, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        encode_labels(on_device, layout, out=out)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # A logarithm or a quotient may round across a step or a midpoint, rarely.
    different = (out.cpu() != encode_labels(keys, layout)).any(-1).float().mean()
    assert different < 1e-3
    torch.testing.assert_close(decode_labels(out, layout).cpu(), decode_labels(out.cpu(), layout), rtol=1e-5, atol=0)
