"""The new token of a decode step: RoPE, its K/V row, its window slot and its scalar label, in one launch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ds_offload.kernels.label_codec import FLOAT16_MAX, SCALE_SHARE, LabelLayout, encode_labels
from ds_offload.kernels.new_token_kernels import new_token_kernel, rotate_kernel
from ds_offload.kernels.triton_runtime import launching, power_of_two

Rope = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class HeadNorms:
    """RMSNorms of every head's query and key (Qwen3): weights [D] of the projections' dtype."""

    query: Tensor
    key: Tensor
    eps: float


@dataclass(frozen=True)
class WindowRows:
    """Device rows [B, Hkv, C, 2, D] whose first slots are the sinks and the ring of recent tokens."""

    rows: Tensor
    sinks: int
    ring: int


@dataclass(frozen=True)
class LabelRows:
    """One layer's part of a label cache of scalar labels.

    Attributes:
        rows: uint8 [Hkv, N, row_bytes], a head's rows side by side.
        layout: Their code.
        channels: int64 [Hkv, R], the kept channels.
        mean: float32 [Hkv, R], what is taken off them.
        starts: int64 [B], where each sequence begins.
    """

    rows: Tensor
    layout: LabelLayout
    channels: Tensor
    mean: Tensor
    starts: Tensor


def new_token(
    projected: Tensor,
    rope: Rope,
    positions: Tensor,
    kv_rows: Tensor,
    *,
    norms: HeadNorms | None = None,
    window: WindowRows | None = None,
    labels: LabelRows | None = None,
) -> Tensor:
    """Take in the newest token of each sequence of one layer.

    Heads are normed and rotated in float32 and rounded once to the projections' dtype.
    K and V go side by side into `kv_rows` and into the token's window slot, the key's label
    into the label cache. On CUDA one launch, which waits for nothing.

    Args:
        projected: [B, (H + 2 * Hkv) * D], contiguous: queries, keys, values of the new
            tokens as the linear layers give them; float32, float16 or bfloat16.
        rope: cos and sin, [B, D] each, as transformers makes them (two equal halves).
        positions: int64 [B] on the device, token number per sequence.
        kv_rows: [B, Hkv, 2, D] of the store's dtype, contiguous; written.
        norms: None where the model has none.
        window: The token at position p goes to slot p below `sinks`, else to
            sinks + p % ring; None writes no slot.
        labels: None writes no label.

    Returns:
        Rotated queries [B, H, D] of the projections' dtype.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    _check(projected, rope, positions, kv_rows, window, labels)
    if not projected.is_cuda:
        return new_token_reference(projected, rope, positions, kv_rows, norms=norms, window=window, labels=labels)
    with launching(projected.device, "new_token"):
        return _launch(projected, rope, positions, kv_rows, norms, window, labels)


def _launch(
    projected: Tensor,
    rope: Rope,
    positions: Tensor,
    kv_rows: Tensor,
    norms: HeadNorms | None,
    window: WindowRows | None,
    labels: LabelRows | None,
) -> Tensor:
    batch, kv_heads, _, dim = kv_rows.shape
    heads = projected.shape[1] // dim - 2 * kv_heads
    query = torch.empty(batch, heads, dim, dtype=projected.dtype, device=projected.device)
    layout = labels.layout if labels is not None else LabelLayout(1, 16)
    per_byte = 1 if layout.bits == 16 else layout.per_byte
    elements = layout.channels if layout.bits == 16 else layout.code_bytes
    cos, sin = (value.contiguous() for value in rope)
    no_norms = (None, None, 0.0)
    new_token_kernel[(batch * kv_heads,)](
        *(projected, cos, sin, positions, query, kv_rows),
        *((norms.query, norms.key, norms.eps) if norms is not None else no_norms),
        *((window.rows, *window.rows.stride()[:3], window.sinks, window.ring) if window else (None, 0, 0, 0, 0, 1)),
        *((labels.rows, labels.rows.stride(0)) if labels else (None, 0)),
        *((labels.channels, labels.mean, labels.starts) if labels else (None, None, None)),
        kv_heads,
        G=heads // kv_heads,
        D=dim,
        D_PAD=power_of_two(dim),
        NORMED=norms is not None,
        WINDOW=window is not None,
        LABELS=labels is not None,
        R=layout.channels,
        BITS=layout.bits,
        PER=per_byte,
        ELEMENTS=elements,
        ELEMENTS_PAD=power_of_two(elements),
        ROW_BYTES=layout.row_bytes,
        SHARE=SCALE_SHARE.get(layout.bits, 1.0),
        FLOAT16_MAX=FLOAT16_MAX,
        num_warps=4,
    )
    return query


def new_token_reference(
    projected: Tensor,
    rope: Rope,
    positions: Tensor,
    kv_rows: Tensor,
    *,
    norms: HeadNorms | None = None,
    window: WindowRows | None = None,
    labels: LabelRows | None = None,
) -> Tensor:
    """`new_token` in torch."""
    batch, kv_heads, _, dim = kv_rows.shape
    heads = projected.view(batch, -1, dim)
    count = heads.shape[1] - 2 * kv_heads
    query = rotate_heads_reference(heads[:, :count], rope, norms.query if norms else None, norms.eps if norms else 0.0)
    key = rotate_heads_reference(
        heads[:, count : count + kv_heads], rope, norms.key if norms else None, norms.eps if norms else 0.0
    )
    kv_rows[:, :, 0] = key
    kv_rows[:, :, 1] = heads[:, count + kv_heads :]
    sequence = torch.arange(batch, device=projected.device)
    if window is not None:
        slots = torch.where(positions < window.sinks, positions, window.sinks + positions % window.ring)
        window.rows[sequence, :, slots] = kv_rows
    if labels is not None:
        kept = key.gather(-1, labels.channels.expand(batch, -1, -1)).float() - labels.mean
        encoded = encode_labels(kept, labels.layout)
        labels.rows[:, labels.starts + positions] = encoded.transpose(0, 1)
    return query


def rotate_heads(heads: Tensor, rope: Rope, weight: Tensor | None = None, eps: float = 0.0) -> Tensor:
    """Norm and rotate heads alone: the predicted queries of a layer.

    Args:
        heads: [B, H, D] as the linear layer gives them.
        rope: cos and sin [B, D].
        weight: RMSNorm weight [D] of every head, or None.
        eps: Its epsilon.

    Returns:
        [B, H, D] of the same dtype, with the bits that `new_token` gives.
    """
    if not heads.is_cuda:
        return rotate_heads_reference(heads, rope, weight, eps)
    with launching(heads.device, "rotate_heads"):
        return _rotate(heads, rope, weight, eps)


def _rotate(heads: Tensor, rope: Rope, weight: Tensor | None, eps: float) -> Tensor:
    batch, count, dim = heads.shape
    out = torch.empty(batch, count, dim, dtype=heads.dtype, device=heads.device)
    rotate_kernel[(batch * count,)](
        heads.contiguous(), rope[0].contiguous(), rope[1].contiguous(), out, weight, eps, count,
        D=dim, D_PAD=power_of_two(dim), NORMED=weight is not None, num_warps=4,
    )  # fmt: skip
    return out


def rotate_heads_reference(heads: Tensor, rope: Rope, weight: Tensor | None = None, eps: float = 0.0) -> Tensor:
    """`rotate_heads` in torch."""
    value = heads.float()
    if weight is not None:
        value = value * torch.rsqrt(value.square().mean(-1, keepdim=True) + eps) * weight.float()
    first, second = value.chunk(2, -1)
    turned = torch.cat((-second, first), -1)
    return (value * rope[0].float()[:, None] + turned * rope[1].float()[:, None]).to(heads.dtype)


def _check(
    projected: Tensor,
    rope: Rope,
    positions: Tensor,
    kv_rows: Tensor,
    window: WindowRows | None,
    labels: LabelRows | None,
) -> None:
    if kv_rows.dim() != 4 or kv_rows.shape[2] != 2 or not kv_rows.is_contiguous():
        raise ValueError(f"kv_rows {tuple(kv_rows.shape)} must be [B, Hkv, 2, D], contiguous")
    batch, kv_heads, _, dim = kv_rows.shape
    if projected.dim() != 2 or projected.shape[0] != batch or not projected.is_contiguous():
        raise ValueError(f"projected {tuple(projected.shape)} must be [{batch}, (H + 2 Hkv) D], contiguous")
    heads = projected.shape[1] / dim - 2 * kv_heads
    if heads < kv_heads or heads % kv_heads:
        raise ValueError(
            f"projected {tuple(projected.shape)} holds {heads:g} query heads of {dim}; "
            f"it must hold a multiple of the {kv_heads} KV heads"
        )
    for name, value in (("cos", rope[0]), ("sin", rope[1])):
        if value.shape != (batch, dim) or dim % 2:
            raise ValueError(f"{name} {tuple(value.shape)} must be [{batch}, {dim}], of an even head dim")
    if positions.dtype != torch.int64 or positions.shape != (batch,):
        raise ValueError(f"positions {positions.dtype} {tuple(positions.shape)} must be int64 ({batch},)")
    given = [("rope", rope[0]), ("positions", positions), ("kv_rows", kv_rows)]
    if window is not None:
        rows = window.rows
        if rows.dim() != 5 or rows.shape[:2] != (batch, kv_heads) or rows.stride()[3:] != (dim, 1):
            raise ValueError(f"window rows {tuple(rows.shape)} must be [{batch}, {kv_heads}, C, 2, {dim}]")
        if rows.dtype != kv_rows.dtype or not 0 <= window.sinks < window.sinks + window.ring <= rows.shape[2]:
            raise ValueError(
                f"window rows {rows.dtype} {tuple(rows.shape)} must be {kv_rows.dtype} and hold "
                f"{window.sinks} sinks and a ring of {window.ring}"
            )
        given.append(("window rows", rows))
    if labels is not None:
        kept = (kv_heads, labels.layout.channels)
        if labels.rows.dtype != torch.uint8 or labels.rows.shape[::2] != (kv_heads, labels.layout.row_bytes):
            raise ValueError(
                f"labels {labels.rows.dtype} {tuple(labels.rows.shape)} must be uint8 "
                f"[{kv_heads}, N, {labels.layout.row_bytes}]"
            )
        if labels.channels.shape != kept or labels.mean.shape != kept or labels.starts.shape != (batch,):
            raise ValueError(
                f"channels {tuple(labels.channels.shape)}, mean {tuple(labels.mean.shape)} and starts "
                f"{tuple(labels.starts.shape)} must be {kept}, {kept} and ({batch},)"
            )
        side_by_side = labels.rows.stride()[1:] == (labels.layout.row_bytes, 1)
        if not (labels.channels.is_contiguous() and labels.mean.is_contiguous() and side_by_side):
            raise ValueError("channels and mean must be contiguous, and the label rows of a head side by side")
        given += [("labels", labels.rows), ("channels", labels.channels), ("mean", labels.mean)]
    for name, value in given:
        if value.device != projected.device:
            raise ValueError(f"{name} on {value.device} must be on {projected.device} like projected")
