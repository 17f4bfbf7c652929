"""The label code: a few channels of a key, packed to bits with one scale per token.

Everything that knows the format stands in this file: other kernels see a
`LabelLayout`, and rows of `row_bytes` bytes.

The format of a row, for R channels at b = 8, 4 or 2 bits. A row is a multiple of 4 bytes:

* first ceil(R * b / 8) bytes of codes: channel j sits at bits (j * b) % 8 of byte
  (j * b) // 8, least significant bits first; unused bits are zero;
* then 0 to 3 zero bytes of padding;
* the last byte of the row is the scale byte s, on a log grid: scale = 2 ** ((s - 128) / 12).

Code c stands for scale * (2c - n) / n with n = 2 ** b - 1: evenly spaced from -scale
to +scale, symmetric, without a zero. At 16 bits a row is R float16 values, then two zero
bytes where R is odd, and has no scale byte.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SCALE_STEPS = 12
SCALE_BIAS = 128
FLOAT16_MAX = 65504.0
# The scale as a share of a row's largest magnitude; 1 where not named. With four levels,
# 0.8 lowers the squared error of scores by 34 % on Gaussian keys and by 37 to 39 % on
# Laplace, Student-t (3) and unequally wide channels. On SmolLM2-135M (28 channels, six
# texts of 4K tokens, 1/16 of the tokens) the attention kept is the same (0.887 of the mass)
# and the loss over dense 0.026 instead of 0.032 nats, a difference within its noise.
SCALE_SHARE = {2: 0.8}
# Elements encoded at a time: bounds the float32 temporaries to a few times 64 MiB.
CHUNK_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class LabelLayout:
    """How one token's label is stored.

    CUDA kernels read rows of a multiple of 8 or 16 bytes in vectors of that size, others
    in words of 4 bytes.

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
    def largest(self) -> int:
        """n, the largest code below 16 bits."""
        return 2**self.bits - 1

    @property
    def per_byte(self) -> int:
        """Channels whose codes share a byte, below 16 bits."""
        return 8 // self.bits

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's label: codes, padding and, below 16 bits, the scale byte; a multiple of 4."""
        return -(-(self.code_bytes + (self.bits < 16)) // 4) * 4


def encode_labels(keys: Tensor, layout: LabelLayout, out: Tensor | None = None) -> Tensor:
    """Pack the kept, centred channels of keys.

    The scale is the largest magnitude of the row, times 0.8 at 2 bits (`SCALE_SHARE`),
    rounded to the nearest step of the log grid; codes are the nearest level under that
    rounded scale. An all-zero row gets s = 0, so it decodes to values of at most 2 ** (-128 / 12).

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
        halves = values.clamp(-FLOAT16_MAX, FLOAT16_MAX).to(torch.float16).contiguous()
        out[..., : layout.code_bytes].copy_(halves.view(torch.uint8))
        out[..., layout.code_bytes :].zero_()
        return
    scale = values.abs().amax(-1, keepdim=True).mul_(SCALE_SHARE.get(layout.bits, 1.0))
    step = scale.log2_().mul_(SCALE_STEPS).add_(SCALE_BIAS).round_().clamp_(0, 255)
    out[..., -1:].copy_(step)
    largest = layout.largest
    inverse = step.sub_(SCALE_BIAS).mul_(-1 / SCALE_STEPS).exp2_().mul_(largest / 2)
    codes = (values * inverse).add_(largest / 2).round_().clamp_(0, largest).to(torch.uint8)
    codes = torch.nn.functional.pad(codes, (0, layout.code_bytes * layout.per_byte - layout.channels))
    codes = codes.unflatten(-1, (layout.code_bytes, layout.per_byte))
    packed = codes[..., 0].clone()
    for slot in range(1, layout.per_byte):
        packed |= codes[..., slot] << (slot * layout.bits)
    out[..., : layout.code_bytes].copy_(packed)
    out[..., layout.code_bytes : -1].zero_()


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
        return rows[..., : layout.code_bytes].contiguous().view(torch.float16).to(torch.float32)
    return decode_levels(rows, layout).div_(layout.largest).mul_(decode_scales(rows[..., -1:]))


def decode_levels(rows: Tensor, layout: LabelLayout) -> Tensor:
    """The whole numbers 2c - n of rows (uint8 [..., row_bytes], bits below 16): float32 [..., R]."""
    levels = byte_levels(layout, rows.device).to(torch.float32)
    levels = torch.nn.functional.embedding(rows[..., : layout.code_bytes].to(torch.int32), levels)
    return levels.flatten(-2)[..., : layout.channels]


def byte_levels(layout: LabelLayout, device: torch.device | str = "cpu") -> Tensor:
    """The whole numbers 2c - n that each byte of codes stands for: int16 [256, channels per byte]."""
    shifts = torch.arange(0, 8, layout.bits, dtype=torch.uint8, device=device)
    codes = (torch.arange(256, dtype=torch.uint8, device=device)[:, None] >> shifts) & layout.largest
    return codes.to(torch.int16).mul_(2).sub_(layout.largest)


def decode_scales(steps: Tensor) -> Tensor:
    """The scales that scale bytes (uint8, any shape) stand for, float32."""
    return steps.to(torch.float32).sub_(SCALE_BIAS).div_(SCALE_STEPS).exp2_()
