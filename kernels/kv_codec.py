"""K/V rows at 8 or 4 bits: how a row is laid out in bytes, and the way there and back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ds_offload.kernels.kv_codec_kernels import decode_kernel, encode_kernel
from ds_offload.kernels.triton_runtime import launching, power_of_two

FLOAT16_MAX = 65504.0
# Behind the codes of K and of V: centre and step of both halves of the channels, float16 each.
TAIL_BYTES = 8
# Rows along the last but two dimensions that the reference has in float32 at a time.
REFERENCE_ROWS = 512
# Rows of one program of the CUDA kernels.
TILE_ROWS = 16


@dataclass(frozen=True)
class RowLayout:
    """The bytes of K, and of V, of one token of one KV head: codes, then the numbers that undo them.

    Channels c and c + D/2, which RoPE turns together, belong to two halves with a centre
    and a step of their own: x = centre + step * (code - N/2), N = 2^bits - 1. At 8 bits
    byte c is channel c's code; at 4 bits byte c, of the first D/2, has that of channel c in its low half and that of
    channel c + D/2 in its high half. The last 8 bytes are each half's centre and step, float16.

    Attributes:
        bits: 8 or 4.
        head_dim: D, even.

    Raises:
        ValueError: Other bits, or an odd head dim.
    """

    bits: int
    head_dim: int

    def __post_init__(self) -> None:
        if self.bits not in (8, 4) or self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"bits={self.bits}, head_dim={self.head_dim}; bits must be 8 or 4, and the head dim even")

    @property
    def code_bytes(self) -> int:
        """Bytes of the codes of K, or of V."""
        return self.head_dim * self.bits // 8

    @property
    def part_bytes(self) -> int:
        """Bytes of K, or of V: a multiple of 8, so that a row is one of 16."""
        return -(-(self.code_bytes + TAIL_BYTES) // 8) * 8

    @property
    def row_bytes(self) -> int:
        """Bytes of K and V of one token of one KV head."""
        return 2 * self.part_bytes


@dataclass(frozen=True)
class RowCode:
    """A layout, and what the channels of keys are divided by before they are quantised.

    Attributes:
        layout: The bytes.
        factor: Powers of two, float32, of a shape that broadcasts to `[..., D]` of the keys.
    """

    layout: RowLayout
    factor: Tensor


def encode_rows(rows: Tensor, code: RowCode) -> Tensor:
    """Quantise rows `[..., 2, D]` of float32, float16 or bfloat16, K and V side by side.

    On CUDA one launch reads each row once. A row's channels are contiguous, and one to
    three dimensions lead. K and V are finite; centres and steps beyond +-65504 saturate.

    Returns:
        `[..., 2, P]` uint8, contiguous, P = `code.layout.part_bytes`; see `RowLayout`.

    Raises:
        ValueError: rows of another head dim or of more dimensions.
    """
    if not rows.is_cuda:
        return encode_rows_reference(rows, code)
    out = _coded_like(rows, code.layout)
    with launching(rows.device, "encode_rows"):
        _launch(encode_kernel, rows, out, code)
    return out


def encode_rows_reference(rows: Tensor, code: RowCode) -> Tensor:
    """`encode_rows` in torch, float32."""
    out = _coded_like(rows, code.layout)
    shape = rows.shape[:-2]
    factor = code.factor.expand(*shape, rows.shape[-1])
    for first in range(0, shape[-1], REFERENCE_ROWS):
        part = (..., slice(first, first + REFERENCE_ROWS), slice(None))
        keys = rows[..., 0, :][part].float() / factor[part]
        _encode(keys, code.layout, out[..., 0, :][part])
        _encode(rows[..., 1, :][part].float(), code.layout, out[..., 1, :][part])
    return out


def _encode(values: Tensor, layout: RowLayout, out: Tensor) -> None:
    """Quantise `[..., D]` float32 into `out` `[..., P]`."""
    top = 2**layout.bits - 1
    halves = values.unflatten(-1, (2, -1))
    low, high = halves.aminmax(dim=-1, keepdim=True)
    centre = _rounded((low + high) / 2)
    # The centre's rounding may leave one side more than the other.
    step = _rounded(torch.maximum(high - centre, centre - low) * (2 / top))
    inverse = torch.where(step > 0, 1 / step, 0)
    codes = ((halves - centre) * inverse + (top / 2 + 0.5)).floor_().clamp_(0, top).to(torch.uint8)
    first, second = codes.unbind(-2)
    packed = torch.cat((first, second), -1) if layout.bits == 8 else first | second << 4
    out[..., : layout.code_bytes] = packed
    out[..., -TAIL_BYTES:] = torch.cat((centre, step), -1).flatten(-2).half().contiguous().view(torch.uint8)


def _rounded(value: Tensor) -> Tensor:
    """To float16 and back."""
    return value.clamp(-FLOAT16_MAX, FLOAT16_MAX).half().float()


def decode_rows(coded: Tensor, code: RowCode, out: Tensor) -> Tensor:
    """Undo `encode_rows`: `coded` `[..., 2, P]` into `out` `[..., 2, D]` of any float dtype; returns `out`.

    On CUDA one launch; the bytes of K and V and the channels of `out` are contiguous and one to
    three dimensions lead.

    Raises:
        ValueError: `out` is of another shape.
    """
    if coded.shape != (*out.shape[:-1], code.layout.part_bytes) or out.shape[-1] != code.layout.head_dim:
        raise ValueError(f"out {tuple(out.shape)} does not hold coded rows {tuple(coded.shape)} of {code.layout}")
    if not coded.is_cuda:
        return decode_rows_reference(coded, code, out)
    with launching(coded.device, "decode_rows"):
        _launch(decode_kernel, out, coded, code)
    return out


def decode_rows_reference(coded: Tensor, code: RowCode, out: Tensor) -> Tensor:
    """`decode_rows` in torch, float32."""
    shape = out.shape[:-2]
    factor = code.factor.expand(*shape, out.shape[-1])
    for first in range(0, shape[-1], REFERENCE_ROWS):
        part = (..., slice(first, first + REFERENCE_ROWS), slice(None))
        keys = _decode(coded[..., 0, :][part], code.layout)
        out[..., 0, :][part] = keys.mul_(factor[part])
        out[..., 1, :][part] = _decode(coded[..., 1, :][part], code.layout)
    return out


def _decode(coded: Tensor, layout: RowLayout) -> Tensor:
    """`[..., P]` to `[..., D]` float32."""
    codes = coded[..., : layout.code_bytes]
    if layout.bits == 4:
        codes = torch.cat((codes & 15, codes >> 4), -1)
    tail = coded[..., -TAIL_BYTES:].contiguous().view(torch.float16).float().unflatten(-1, (2, 2))
    centre, step = tail[..., :1], tail[..., 1:]
    return (codes.unflatten(-1, (2, -1)).float().sub_((2**layout.bits - 1) / 2).mul_(step).add_(centre)).flatten(-2)


def _coded_like(rows: Tensor, layout: RowLayout) -> Tensor:
    if rows.shape[-2:] != (2, layout.head_dim):
        raise ValueError(f"rows {tuple(rows.shape)} must be [..., 2, {layout.head_dim}]")
    shape = (*rows.shape[:-1], layout.part_bytes)
    gapless = layout.code_bytes + TAIL_BYTES == layout.part_bytes
    make = torch.empty if gapless else torch.zeros
    return make(shape, dtype=torch.uint8, device=rows.device)


def _launch(kernel: object, rows: Tensor, coded: Tensor, code: RowCode) -> None:
    """Run a kernel between `rows` `[..., 2, D]` and `coded` `[..., 2, P]`."""
    layout, lead = code.layout, rows.dim() - 2
    if lead > 3 or rows.stride(-1) != 1 or coded.stride(-1) != 1:
        raise ValueError(f"rows {tuple(rows.shape)} must have at most three dimensions before K and V, and be dense")
    if rows.numel() == 0:
        return
    factor = code.factor.expand(*rows.shape[:-2], layout.head_dim)
    sizes = (1,) * (3 - lead) + tuple(rows.shape[:-2])
    strides = [(0,) * (3 - lead) + value.stride()[:lead] for value in (rows, coded, factor)]
    # Of K and V.
    strides[0] += (rows.stride(-2),)
    strides[1] += (coded.stride(-2),)
    count = rows.shape[:-2].numel()
    half = layout.head_dim // 2
    kernel[(-(-count // TILE_ROWS), 2)](  # type: ignore[index]
        *(rows, coded, factor),
        *(count, sizes[1], sizes[2]),
        *(stride for group in strides for stride in group),
        BITS=layout.bits,
        HALF=half,
        HALF_PAD=power_of_two(half),
        PART_BYTES=layout.part_bytes,
        TILE=TILE_ROWS,
        FLOAT16_MAX=FLOAT16_MAX,
        num_warps=4,
    )
