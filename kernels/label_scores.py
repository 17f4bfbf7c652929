"""Scores of every cached token from its packed label: which keys a query is likely to need."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_offload.kernels.label_codec import LabelLayout, decode_labels

# Tokens decoded at a time by the reference: bounds its float32 copy of the labels.
REFERENCE_BLOCK = 1 << 16


def label_scores(
    labels: Tensor,
    layout: LabelLayout,
    query: Tensor,
    starts: Tensor,
    lengths: Tensor,
    max_length: int,
    scaling: float,
    out: Tensor | None = None,
) -> Tensor:
    """Score each cached token of each sequence against each query head.

    out[b, h, t] = scaling * <query[b, h], decode(labels[h // G, starts[b] + t])> for
    t < lengths[b], and -inf from there to max_length. A sequence's scores do not depend
    on the other sequences of the batch, bit for bit.

    Args:
        labels: uint8 [Hkv, N, row_bytes], the label cache; a head's rows may be strided.
        layout: The code of the labels.
        query: float32 [B, H, R], the kept channels of the queries; H a multiple of Hkv.
        starts: int64 [B], first row of each sequence in the label cache.
        lengths: int64 [B], tokens of each sequence; starts + lengths <= N.
        max_length: Columns of the result, at least every length.
        scaling: Factor of every score, 1 / sqrt(D) as in the attention.
        out: float32 [B, H, max_length], contiguous.

    Returns:
        float32 [B, H, max_length]: `out` if given; every element is written.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    return label_scores_reference(labels, layout, query, starts, lengths, max_length, scaling, out)


def label_scores_reference(
    labels: Tensor,
    layout: LabelLayout,
    query: Tensor,
    starts: Tensor,
    lengths: Tensor,
    max_length: int,
    scaling: float,
    out: Tensor | None = None,
) -> Tensor:
    """`label_scores` in torch: decode, then one product per sequence. Waits for the device."""
    out = _checked_out(labels, layout, query, starts, lengths, max_length, out)
    kv_heads, capacity = labels.shape[:2]
    for b, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        if start < 0 or not 0 <= length <= max_length or start + length > capacity:
            raise ValueError(
                f"sequence {b}: rows {start} to {start + length} do not fit {capacity} rows and max_length={max_length}"
            )
        grouped = query[b].unflatten(0, (kv_heads, -1)) * scaling
        scores = out[b].unflatten(0, (kv_heads, -1))
        for first in range(0, length, REFERENCE_BLOCK):
            last = min(length, first + REFERENCE_BLOCK)
            decoded = decode_labels(labels[:, start + first : start + last], layout)
            scores[..., first:last] = grouped @ decoded.mT
        scores[..., length:] = -torch.inf
    return out


def _checked_out(
    labels: Tensor,
    layout: LabelLayout,
    query: Tensor,
    starts: Tensor,
    lengths: Tensor,
    max_length: int,
    out: Tensor | None,
) -> Tensor:
    """The result's tensor, after every argument's shape, dtype and device is checked."""
    if labels.dtype != torch.uint8 or labels.dim() != 3 or labels.shape[2] != layout.row_bytes:
        raise ValueError(f"labels {labels.dtype} {tuple(labels.shape)} must be uint8 [Hkv, N, {layout.row_bytes}]")
    if query.dtype != torch.float32 or query.dim() != 3 or query.shape[2] != layout.channels:
        raise ValueError(f"query {query.dtype} {tuple(query.shape)} must be float32 [B, H, {layout.channels}]")
    batch, heads = query.shape[:2]
    if labels.shape[0] < 1 or heads < 1 or heads % labels.shape[0]:
        raise ValueError(f"{heads} query heads must be a multiple of the labels' {labels.shape[0]} KV heads")
    for name, value in (("starts", starts), ("lengths", lengths)):
        if value.dtype != torch.int64 or value.shape != (batch,):
            raise ValueError(f"{name} {value.dtype} {tuple(value.shape)} must be int64 ({batch},)")
    if max_length < 0:
        raise ValueError(f"max_length={max_length} must not be negative")
    shape = (batch, heads, max_length)
    if out is None:
        out = torch.empty(shape, dtype=torch.float32, device=labels.device)
    elif out.dtype != torch.float32 or out.shape != shape or not out.is_contiguous():
        raise ValueError(f"out {out.dtype} {tuple(out.shape)} must be float32 {shape}, contiguous")
    for name, value in (("query", query), ("starts", starts), ("lengths", lengths), ("out", out)):
        if value.device != labels.device:
            raise ValueError(f"{name} is on {value.device}; it must be on {labels.device} like the labels")
    return out
