"""The product code of labels: a key turned along the axes that matter to queries, cut into parts, a word for each.

Everything that knows the format stands in this file. A key k of a KV head becomes
y = (k - mean) @ basis. Its axes are cut into D / 4 parts of four; each part is told by
the number, below 16, of the nearest of its 16 words. Part p stands in the low half of
byte p / 2 where p is even, else in the high half; a row is a multiple of 4 bytes, with
zeros behind the last part. There is no scale: a key of D channels takes D bits.

A query q is turned the other way, q' = q @ turn.T with turn the inverse of the basis, so
that q' . y = q . (k - mean): a score is the sum of D / 4 numbers, one for the word of each part.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_offload.kernels.product_code_kernels import encode_kernel
from ds_offload.kernels.triton_runtime import launching, power_of_two

# Axes of a part, and words that a part is told by.
PART = 4
WORDS = 16
# Tokens encoded at a time by the reference: bounds its distances to all words.
REFERENCE_TOKENS = 1024
# Tokens that a program of the encoding kernel takes at a time, how often, its warps, and the loads it runs ahead: of
# a prompt of 16-bit keys, of wider ones, and where each sequence has one token.
_PROMPT, _WIDE, _NEW = (64, 16, 4, 3), (32, 32, 2, 1), (16, 1, 2, 1)


@dataclass(frozen=True)
class ProductLayout:
    """How one token's product code is stored.

    Attributes:
        head_dim: D, a multiple of 4.

    Raises:
        ValueError: it is not.
    """

    head_dim: int

    def __post_init__(self) -> None:
        if self.head_dim < PART or self.head_dim % PART:
            raise ValueError(f"head_dim={self.head_dim} must be a multiple of {PART}")

    @property
    def parts(self) -> int:
        """P, parts of a key."""
        return self.head_dim // PART

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's label: two parts to a byte, a multiple of 4."""
        return -(-self.parts // 8) * 4


@dataclass(frozen=True)
class ProductCode:
    """The codes of the KV heads of one layer, or of all layers; float32, contiguous, on one device.

    Attributes:
        mean: `[..., Hkv, D]`, taken off every key.
        basis: `[..., Hkv, D, D]`, axes in columns, a part's four side by side.
        turn: `[..., Hkv, D, D]`, its inverse, axes in rows.
        words: `[..., Hkv, P, 16, 4]`.

    Raises:
        ValueError: shapes or layouts are others.
    """

    mean: Tensor
    basis: Tensor
    turn: Tensor
    words: Tensor

    def __post_init__(self) -> None:
        *heads, dim = self.mean.shape
        square = (*heads, dim, dim)
        shapes = {"basis": square, "turn": square, "words": (*heads, dim // PART, WORDS, PART)}
        for name, shape in shapes.items():
            value = getattr(self, name)
            if value.shape != shape or not value.is_contiguous():
                raise ValueError(f"{name} {tuple(value.shape)} must be {shape}, contiguous, for a mean {(*heads, dim)}")

    @property
    def layout(self) -> ProductLayout:
        """How its rows are stored."""
        return ProductLayout(self.mean.shape[-1])

    def layer(self, layer: int) -> ProductCode:
        """The codes of one of all layers: views."""
        return ProductCode(*(value[layer] for value in self.tensors()))

    def to(self, device: torch.device) -> ProductCode:
        """The same on another device."""
        return ProductCode(*(value.to(device) for value in self.tensors()))

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """mean, basis, turn and words."""
        return self.mean, self.basis, self.turn, self.words


@dataclass(frozen=True)
class ProductRows:
    """One layer's part of a label cache of product codes.

    Attributes:
        rows: uint8 [Hkv, N, row_bytes], a head's rows side by side.
        code: The layer's code.
        starts: int64 [B], where each sequence begins.
    """

    rows: Tensor
    code: ProductCode
    starts: Tensor


def code_bytes(layers: int, kv_heads: int, head_dim: int) -> int:
    """Bytes of a `ProductCode` of all layers."""
    return layers * kv_heads * 4 * (head_dim + 2 * head_dim**2 + WORDS * head_dim)


def encode_product(keys: Tensor, code: ProductCode, out: Tensor) -> None:
    """Encode keys of consecutive tokens of one layer. Never waits for the device.

    Args:
        keys: [Hkv, n, D] of any float dtype; heads and tokens may be strided.
        code: Of the layer, on the same device.
        out: uint8 [Hkv, n, row_bytes], on the same device; heads may be strided.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    _check(keys, code, out, out.shape[1:2])
    if not keys.is_cuda:
        encode_product_reference(keys, code, out)
        return
    with launching(keys.device, "encode_product"):
        launch_encode(keys, code, out, None, None)


def encode_product_reference(keys: Tensor, code: ProductCode, out: Tensor) -> None:
    """`encode_product` in torch: the nearest word of every part, in float32, ties to the lower number."""
    layout, words = code.layout, code.words
    half_norms = words.square().sum(-1).mul_(0.5)
    for first in range(0, keys.shape[1], REFERENCE_TOKENS):
        chunk = slice(first, first + REFERENCE_TOKENS)
        axes = torch.matmul(keys[:, chunk].float() - code.mean[:, None], code.basis)
        parts = axes.unflatten(-1, (layout.parts, PART)).transpose(1, 2)
        nearest = torch.sub(half_norms[:, :, None], parts @ words.mT).argmin(-1)
        out[:, chunk] = pack_parts(nearest.transpose(1, 2), layout)


def encode_new(keys: Tensor, labels: ProductRows, positions: Tensor) -> None:
    """Encode one key of each sequence where its label belongs. On CUDA one launch, which waits for nothing.

    Args:
        keys: [B, Hkv, D] of any float dtype; sequences and heads may be strided.
        labels: Of the layer, on the same device; row starts[b] + positions[b] is written.
        positions: int64 [B] on the same device.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    by_head, code, rows, starts = keys.transpose(0, 1), labels.code, labels.rows, labels.starts
    _check(by_head, code, rows, starts.shape)
    if keys.is_cuda:
        with launching(keys.device, "encode_new"):
            launch_encode(by_head, code, rows, starts, positions)
        return
    encoded = torch.empty(*by_head.shape[:2], rows.shape[2], dtype=torch.uint8)
    encode_product_reference(by_head, code, encoded)
    rows[:, starts + positions] = encoded


def launch_encode(
    keys: Tensor, code: ProductCode, out: Tensor, starts: Tensor | None, positions: Tensor | None
) -> None:
    """Encode keys [Hkv, n, D], checked: token t to row t of `out`, or to row starts[t] + positions[t]."""
    kv_heads, tokens, head_dim = keys.shape
    if tokens == 0:
        return
    layout, halves = code.layout, keys.dtype in (torch.float16, torch.bfloat16)
    # What runs ahead has to fit the 99 KiB of shared memory that sm_86, 89 and 120 have for a program.
    block, blocks, warps, stages = _NEW if starts is not None else _PROMPT if halves and head_dim <= 128 else _WIDE
    words = layout.row_bytes // 4
    encode_kernel[(-(-tokens // (block * blocks)) * words, kv_heads)](
        *(keys, *keys.stride()),
        *(code.mean, code.basis, code.words, starts, positions, out, out.stride(0), tokens),
        D=head_dim,
        D_PAD=max(16, power_of_two(head_dim)),
        PARTS=layout.parts,
        ROW_WORDS=words,
        EACH=starts is not None,
        HALVES=halves,
        BLOCK=block,
        BLOCKS=blocks,
        ALIGNMENT=_alignment(keys),
        num_warps=warps,
        num_stages=stages,
    )


def _alignment(keys: Tensor) -> int:
    """Bytes, at most 16, that each key [D] of `keys` begins at a multiple of; an element's where keys are strided."""
    size = keys.element_size()
    if keys.stride(2) != 1:
        return size
    return math.gcd(16, keys.data_ptr(), *(stride * size for stride in keys.stride()[:2]))


def pack_parts(numbers: Tensor, layout: ProductLayout) -> Tensor:
    """Numbers of words [..., P], below 16, as rows: uint8 [..., row_bytes]."""
    numbers = torch.nn.functional.pad(numbers.to(torch.uint8), (0, 2 * layout.row_bytes - layout.parts))
    return numbers[..., ::2] | numbers[..., 1::2] << 4


def unpack_parts(rows: Tensor, layout: ProductLayout) -> Tensor:
    """The numbers of words in rows (uint8 [..., row_bytes]): int64 [..., P]."""
    return torch.stack((rows & 15, rows >> 4), -1).flatten(-2)[..., : layout.parts].to(torch.int64)


def decode_product(rows: Tensor, code: ProductCode) -> Tensor:
    """The keys that labels stand for, without their mean.

    Args:
        rows: uint8 [Hkv, n, row_bytes], on the code's device.
        code: Of the layer.

    Returns:
        float32 [Hkv, n, D].
    """
    numbers = unpack_parts(rows, code.layout)
    head = torch.arange(len(rows), device=rows.device)[:, None, None]
    part = torch.arange(code.layout.parts, device=rows.device)
    return torch.matmul(code.words[head, part, numbers].flatten(-2), code.turn)


def _check(keys: Tensor, code: ProductCode, out: Tensor, tokens: tuple[int, ...]) -> None:
    kv_heads, head_dim = code.mean.shape
    if not keys.is_floating_point() or keys.shape != (kv_heads, *tokens, head_dim):
        raise ValueError(
            f"keys {keys.dtype} {tuple(keys.shape)} must be floating point {(kv_heads, *tokens, head_dim)}"
        )
    row_bytes = code.layout.row_bytes
    side_by_side = out.dim() == 3 and out.stride()[1:] == (row_bytes, 1)
    if out.dtype != torch.uint8 or not side_by_side or out.shape[::2] != (kv_heads, row_bytes):
        raise ValueError(
            f"labels {out.dtype} {tuple(out.shape)} must be uint8 [{kv_heads}, n, {row_bytes}], "
            "the rows of a head side by side"
        )
    for name, value in (("code", code.mean), ("labels", out)):
        if value.device != keys.device:
            raise ValueError(f"{name} on {value.device} must be on {keys.device} like the keys")
