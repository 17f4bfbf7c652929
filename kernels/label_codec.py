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

from ds_offload.kernels.triton_runtime import jit, power_of_two, tl

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

    CUDA kernels read rows of a multiple of 4, 8 or 16 bytes in words of that size; other
    rows byte by byte, several times slower.

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
    def elements(self) -> int:
        """What a kernel decodes at a time: float16 values at 16 bits, else bytes of codes."""
        return self.channels if self.bits == 16 else self.code_bytes

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's label: the codes and, below 16 bits, the scale byte."""
        return self.code_bytes + (0 if self.bits == 16 else 1)


@jit
def _arrange_query_kernel(
    query,
    out,
    factor,
    R: tl.constexpr,
    BITS: tl.constexpr,
    PER: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_PAD: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, PER)[:, None]
    place = tl.arange(0, WIDTH_PAD)[None, :]
    channel = place * PER + slot
    value = tl.load(query + head * R + channel, mask=channel < R, other=0.0) * factor
    if BITS < 16:
        value = value * tl.exp2((8 - BITS * slot).to(tl.float32))
    tl.store(out + head * PER * WIDTH + slot * WIDTH + place, value, mask=place < WIDTH)


def arrange_query(query: Tensor, layout: LabelLayout, tile: int, scaling: float) -> Tensor:
    """Lay queries out as `label_dots` reads them: by position in a byte, then by byte.

    Args:
        query: float32 [B, H, R], contiguous, CUDA.
        layout: The code of the labels.
        tile: The TILE that `label_dots` will get.
        scaling: Factor of every score.

    Returns:
        float32 [B, H, codes per byte, code bytes rounded up to a multiple of `tile`],
        zero where there is no channel; scaling and the levels' constant are folded in.
    """
    per_byte = 1 if layout.bits == 16 else 8 // layout.bits
    width = -(-layout.elements // tile) * tile
    out = query.new_empty(*query.shape[:2], per_byte, width)
    _arrange_query_kernel[(query.shape[0] * query.shape[1],)](
        query,
        out,
        float(scaling) if layout.bits == 16 else scaling * 2 / (2**layout.bits - 1),
        R=layout.channels,
        BITS=layout.bits,
        PER=per_byte,
        WIDTH=width,
        WIDTH_PAD=power_of_two(width),
        num_warps=1,
    )
    return out


@jit
def label_dots(
    rows,
    live,
    query,
    R: tl.constexpr,
    BITS: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    HEADS: tl.constexpr,
    HEADS_PAD: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Products of packed labels with queries of one group, for use inside a kernel.

    Args:
        rows: [BLOCK] pointers to uint8, the first byte of each token's row.
        live: [BLOCK] bool, rows that may be read; the products of others mean nothing.
        query: Pointer to the first of HEADS queries as `arrange_query` lays it out.
        TILE: Stored elements (code bytes, or float16 values) of a row decoded at a time.

    Returns:
        float32 [BLOCK, HEADS_PAD]; columns from HEADS on are zero.

    A code becomes a float without an integer conversion, which is slow on GPUs: its
    bits are put into the mantissa of a number in [1, 2), and one exact subtraction
    leaves (c - n / 2) times a power of two, which the arranged query undoes.
    """
    PER: tl.constexpr = 1 if BITS == 16 else 8 // BITS
    WIDTH: tl.constexpr = ((R + PER - 1) // PER + TILE - 1) // TILE * TILE
    element = tl.arange(0, TILE)
    group = tl.arange(0, HEADS_PAD)
    dots = tl.zeros([BLOCK, HEADS_PAD], tl.float32)
    for first in tl.static_range(0, WIDTH, TILE):
        place = first + element
        inside = live[:, None]
        if BITS == 16:
            if first + TILE > R:
                inside = inside & (place < R)[None, :]
            codes = tl.load(rows.to(tl.pointer_type(tl.float16))[:, None] + place[None, :], mask=inside, other=0.0)
        else:
            if first + TILE > ROW_BYTES:
                inside = inside & (place < ROW_BYTES)[None, :]
            codes = tl.load(rows[:, None] + place[None, :], mask=inside, other=0).to(tl.int32) << 15
        for g in tl.static_range(HEADS):
            products = tl.zeros([BLOCK, TILE], tl.float32)
            for slot in tl.static_range(PER):
                if BITS == 16:
                    level = codes.to(tl.float32)
                else:
                    # Byte bits 0..7 sit in mantissa bits 15..22, worth 2 ** -8 .. 2 ** -1.
                    field = codes & ((2**BITS - 1) << (15 + BITS * slot))
                    level = (field | 0x3F800000).to(tl.float32, bitcast=True)
                    level = level - (1.0 + (2**BITS - 1) * 2.0 ** (BITS * slot - 9))
                products += level * tl.load(query + (g * PER + slot) * WIDTH + place)[None, :]
            dots += tl.where(group[None, :] == g, tl.sum(products, axis=1)[:, None], 0.0)
    if BITS < 16:
        step = tl.load(rows + (ROW_BYTES - 1), mask=live, other=0).to(tl.float32)
        dots = dots * tl.exp2((step - 128.0) * (1.0 / 12.0))[:, None]
    return dots


def encode_labels(keys: Tensor, layout: LabelLayout, out: Tensor | None = None) -> Tensor:
    """Pack the kept, centred channels of keys.

    The scale is the largest magnitude of the row, times 0.8 at 2 bits (`SCALE_SHARE`),
    rounded to the nearest step of the log grid; codes are the nearest level under that
    rounded scale. An all-zero row
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
    scale = values.abs().amax(-1, keepdim=True).mul_(SCALE_SHARE.get(layout.bits, 1.0))
    step = scale.log2_().mul_(SCALE_STEPS).add_(SCALE_BIAS).round_().clamp_(0, 255)
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
    levels = torch.nn.functional.embedding(
        rows[..., : layout.code_bytes].to(torch.int32), byte_levels(layout, rows.device)
    )
    return levels.flatten(-2)[..., : layout.channels] * decode_scales(rows[..., layout.code_bytes :])


def byte_levels(layout: LabelLayout, device: torch.device | str = "cpu") -> Tensor:
    """The levels in [-1, 1] that each byte of codes stands for: float32 [256, channels per byte]."""
    largest = 2**layout.bits - 1
    shifts = torch.arange(0, 8, layout.bits, dtype=torch.uint8, device=device)
    codes = (torch.arange(256, dtype=torch.uint8, device=device)[:, None] >> shifts) & largest
    return codes.to(torch.float32).mul_(2).sub_(largest).div_(largest)


def decode_scales(steps: Tensor) -> Tensor:
    """The scales that scale bytes (uint8, any shape) stand for, float32."""
    return steps.to(torch.float32).sub_(SCALE_BIAS).div_(SCALE_STEPS).exp2_()
