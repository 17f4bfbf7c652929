"""The label code: a few channels of a key, packed to bits with one scale per token.

Everything that knows the format stands in this file: other kernels see a
`LabelLayout`, and rows of `row_bytes` bytes.

The format of a row, for R channels at b = 8, 4 or 2 bits:

* ceil(R * b / 8) bytes of codes: channel j sits at bits (j * b) % 8 of byte
  (j * b) // 8, least significant bits first; unused bits are zero;
* one scale byte s, on a log grid: scale = 2 ** ((s - 128) / 12).

Code c stands for scale * (2c - n) / n with n = 2 ** b - 1: evenly spaced from -scale
to +scale, symmetric, without a zero. At 16 bits a row is R float16 values and has no
scale byte.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SCALE_STEPS = 12
SCALE_BIAS = 128
FLOAT16_MAX = 65504.0
# Elements encoded at a time: bounds the float32 temporaries to a few times 64 MiB.
CHUNK_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class LabelLayout:
    """How one token's label is stored.

    Attributes:
        channels: R, kept channels per KV head, at least 1.
        bits: Bits per channel: 16 (float16), 8, 4 or 2.

    Raises:
        ValueError: channels below 1 or bits not in the list.
    """

    channels: int
    bits: int

    def __post_init__(self) -> None:
        if self.channels < 1:
            raise ValueError(f"channels={self.channels} must be at least 1")
        if self.bits not in (16, 8, 4, 2):
            raise ValueError(f"bits={self.bits} must be one of 16, 8, 4, 2")

    @property
    def code_bytes(self) -> int:
        """Bytes of codes in a row."""
        return -(-self.channels * self.bits // 8)

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's label: the codes and, below 16 bits, the scale byte."""
        return self.code_bytes + (0 if self.bits == 16 else 1)


def encode_labels(keys: Tensor, layout: LabelLayout, out: Tensor | None = None) -> Tensor:
    """Pack the kept, centred channels of keys.

    The scale is the largest magnitude of the row, rounded to the nearest step of the
    log grid; codes are the nearest level under that rounded scale. An all-zero row
    gets s = 0, so it decodes to values of at most 2 ** (-128 / 12).

    Works in chunks along the first dimension, so its float32 temporaries stay small,
    and never waits for the device.

    Args:
        keys: [..., R] float of any width, any device.
        layout: The code.
        out: uint8 [..., row_bytes] on the same device, may be a strided view.

    Returns:
        uint8 [..., row_bytes]: `out` if given.

    Raises:
        ValueError: shapes, dtype or device do not fit.
    """
    shape = (*keys.shape[:-1], layout.row_bytes)
    if keys.dim() < 1 or keys.shape[-1] != layout.channels or not keys.is_floating_point():
        raise ValueError(f"keys {keys.dtype} {tuple(keys.shape)} must be floating point [..., {layout.channels}]")
    if out is None:
        out = torch.empty(shape, dtype=torch.uint8, device=keys.device)
    elif out.shape != shape or out.dtype != torch.uint8 or out.device != keys.device:
        raise ValueError(f"out {out.dtype} {tuple(out.shape)} on {out.device} must be uint8 {shape} on {keys.device}")
    rows, packed = (keys, out) if keys.dim() > 1 else (keys[None], out[None])
    step = max(1, CHUNK_ELEMENTS // max(1, rows[:1].numel()))
    for first in range(0, rows.shape[0], step):
        _encode_chunk(rows[first : first + step], layout, packed[first : first + step])
    return out


def _encode_chunk(keys: Tensor, layout: LabelLayout, out: Tensor) -> None:
    values = keys.to(torch.float32)
    if layout.bits == 16:
        out.copy_(values.clamp(-FLOAT16_MAX, FLOAT16_MAX).to(torch.float16).contiguous().view(torch.uint8))
        return
    step = values.abs().amax(-1, keepdim=True).log2_().mul_(SCALE_STEPS).add_(SCALE_BIAS).round_().clamp_(0, 255)
    out[..., layout.code_bytes :].copy_(step)
    largest = 2**layout.bits - 1
    inverse = step.sub_(SCALE_BIAS).mul_(-1 / SCALE_STEPS).exp2_().mul_(largest / 2)
    codes = (values * inverse).add_(largest / 2).round_().clamp_(0, largest).to(torch.uint8)
    per_byte = 8 // layout.bits
    codes = torch.nn.functional.pad(codes, (0, layout.code_bytes * per_byte - layout.channels))
    codes = codes.unflatten(-1, (layout.code_bytes, per_byte))
    packed = codes[..., 0].clone()
    for slot in range(1, per_byte):
        packed |= codes[..., slot] << (slot * layout.bits)
    out[..., : layout.code_bytes].copy_(packed)


def decode_labels(rows: Tensor, layout: LabelLayout) -> Tensor:
    """Unpack labels.

    Args:
        rows: uint8 [..., row_bytes], any device.
        layout: The code they were packed with.

    Returns:
        float32 [..., R].

    Raises:
        ValueError: the last dimension or the dtype is not that of the layout.
    """
    if rows.dtype != torch.uint8 or rows.shape[-1] != layout.row_bytes:
        raise ValueError(f"rows {rows.dtype} {tuple(rows.shape)} must be uint8 [..., {layout.row_bytes}]")
    if layout.bits == 16:
        return rows.contiguous().view(torch.float16).to(torch.float32)
    largest = 2**layout.bits - 1
    shifts = torch.arange(0, 8, layout.bits, dtype=torch.uint8, device=rows.device)
    codes = (rows[..., : layout.code_bytes, None] >> shifts) & largest
    levels = codes.flatten(-2)[..., : layout.channels].to(torch.float32).mul_(2 / largest).sub_(1)
    return levels.mul_(decode_scales(rows[..., layout.code_bytes :]))


def decode_scales(steps: Tensor) -> Tensor:
    """The scales that scale bytes (uint8, any shape) stand for, float32."""
    return steps.to(torch.float32).sub_(SCALE_BIAS).div_(SCALE_STEPS).exp2_()
