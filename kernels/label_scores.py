"""Scores of every cached token from its packed label: which keys a query is likely to need."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_offload.kernels.label_codec import LabelLayout, arrange_query, decode_labels, label_dots
from ds_offload.kernels.triton_runtime import jit, launching, power_of_two, tl

# Tokens decoded at a time by the reference: bounds its float32 copy of the labels.
REFERENCE_BLOCK = 1 << 16


@dataclass(frozen=True)
class ScoresLaunch:
    """Launch of the CUDA kernel.

    Attributes:
        heads: Query heads of a group that one program scores; divides the group.
        block: Tokens per program.
        tile: Elements of a row (`LabelLayout.elements`) decoded at a time.
        warps: Warps per program.
    """

    heads: int
    block: int
    tile: int
    warps: int


def scores_launch(layout: LabelLayout, group: int) -> ScoresLaunch:
    """The launch for a label layout and a group of `group` query heads.

    It depends on nothing else, so a row gives the same bits in every batch and at every
    length. A program decodes its rows once for up to 8 heads and keeps them in
    registers: 4 KiB of rows for 4 heads take 138 registers a thread (sm_90, 60 channels
    of 2 bits), for 8 heads they would spill, so those take 2 KiB (153 registers).
    """
    heads = max(n for n in range(1, 9) if group % n == 0)
    tile = min(32, power_of_two(layout.elements))
    return ScoresLaunch(heads, block=(4096 if heads <= 4 else 2048) // max(4, tile), tile=tile, warps=4)


@jit(do_not_specialize=["labels", "head_stride", "max_length"])
def _label_scores_kernel(
    labels,
    query,
    starts,
    lengths,
    out,
    head_stride,
    kv_heads,
    max_length,
    R: tl.constexpr,
    BITS: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    QUERY_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    HEADS_PAD: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    pair = tl.program_id(1).to(tl.int64)
    head = (pair * tl.num_programs(2) + tl.program_id(2)) * HEADS
    start = tl.load(starts + pair // kv_heads)
    length = tl.load(lengths + pair // kv_heads)
    token = first + tl.arange(0, BLOCK)
    live = token < length
    scores = tl.full([BLOCK, HEADS_PAD], float("-inf"), tl.float32)
    if first < length:
        rows = labels + (pair % kv_heads) * head_stride + (start + token) * ROW_BYTES
        rows = tl.multiple_of(rows, ALIGNMENT)
        dots = label_dots(rows, live, query + head * QUERY_SIZE, R, BITS, ROW_BYTES, HEADS, HEADS_PAD, TILE, BLOCK)
        scores = tl.where(live[:, None], dots, float("-inf"))
    column = tl.arange(0, HEADS_PAD)
    target = out + (head + column)[None, :] * max_length + token[:, None]
    tl.store(target, scores, mask=(column < HEADS)[None, :] & (token < max_length)[:, None])


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
    if not labels.is_cuda and layout.bits == 16:
        return label_scores_reference(labels, layout, query, starts, lengths, max_length, scaling, out)
    out = _checked_out(labels, layout, query, starts, lengths, max_length, out)
    if labels.is_cuda:
        if labels.stride(2) != 1 or labels.stride(1) != layout.row_bytes:
            raise ValueError(f"labels with strides {labels.stride()} must have the rows of a head side by side")
        with launching(labels.device, "label_scores"):
            _launch(labels, layout, query, starts, lengths, max_length, scaling, out)
        return out
    # Loads Numba, which takes a second: at first use.
    from ds_offload.kernels.label_scores_cpu import scores_from_bytes

    _check_rows(labels, starts, lengths, max_length)
    scores_from_bytes(labels, layout, query, starts, lengths, scaling, out)
    return out


def _launch(
    labels: Tensor,
    layout: LabelLayout,
    query: Tensor,
    starts: Tensor,
    lengths: Tensor,
    max_length: int,
    scaling: float,
    out: Tensor,
) -> None:
    batch, heads = query.shape[:2]
    kv_heads = labels.shape[0]
    if batch == 0 or max_length == 0:
        return
    group = heads // kv_heads
    launch = scores_launch(layout, group)
    arranged = arrange_query(query.contiguous(), layout, launch.tile, scaling)
    grid = (-(-max_length // launch.block), batch * kv_heads, group // launch.heads)
    _label_scores_kernel[grid](
        labels,
        arranged,
        starts,
        lengths,
        out,
        labels.stride(0),
        kv_heads,
        max_length,
        R=layout.channels,
        BITS=layout.bits,
        ROW_BYTES=layout.row_bytes,
        ALIGNMENT=math.gcd(16, labels.data_ptr(), labels.stride(0), layout.row_bytes),
        QUERY_SIZE=arranged[0, 0].numel(),
        HEADS=launch.heads,
        HEADS_PAD=power_of_two(launch.heads),
        TILE=launch.tile,
        BLOCK=launch.block,
        num_warps=launch.warps,
    )


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
    kv_heads = labels.shape[0]
    for b, (start, length) in enumerate(_check_rows(labels, starts, lengths, max_length)):
        grouped = query[b].unflatten(0, (kv_heads, -1)) * scaling
        scores = out[b].unflatten(0, (kv_heads, -1))
        for first in range(0, length, REFERENCE_BLOCK):
            last = min(length, first + REFERENCE_BLOCK)
            decoded = decode_labels(labels[:, start + first : start + last], layout)
            scores[..., first:last] = grouped @ decoded.mT
        scores[..., length:] = -torch.inf
    return out


def _check_rows(labels: Tensor, starts: Tensor, lengths: Tensor, max_length: int) -> list[tuple[int, int]]:
    """(start, length) of every sequence, each within the label cache. Waits for the device."""
    ranges = list(zip(starts.tolist(), lengths.tolist(), strict=True))
    for b, (start, length) in enumerate(ranges):
        if start < 0 or not 0 <= length <= max_length or start + length > labels.shape[1]:
            raise ValueError(
                f"sequence {b}: rows {start} to {start + length} do not fit the cache's {labels.shape[1]} rows "
                f"and max_length={max_length}"
            )
    return ranges


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
