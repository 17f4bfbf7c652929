"""Attention of one query per sequence over a window of rows as they are and selected rows that are quantised."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from ds_offload.kernels.arriving import Arriving, fetch_arguments
from ds_offload.kernels.coded_attention_kernels import coded_tensor_core_kernel, coded_vector_kernel
from ds_offload.kernels.gather import gather_rows
from ds_offload.kernels.kv_codec import RowCode, RowLayout, decode_rows
from ds_offload.kernels.nibble_attention_kernel import nibble_vector_kernel
from ds_offload.kernels.slot_attention import FLOATS
from ds_offload.kernels.slot_attention_launch import (
    Partials,
    SlotAttentionLaunch,
    StoredRows,
    launch_combine,
    launch_partials,
    slot_attention_launch,
)
from ds_offload.kernels.sparse_attention import sparse_attention, sparse_attention_reference
from ds_offload.kernels.triton_runtime import launching, power_of_two

# Without tensor cores: rows read at a time, entries of the list per program, how far loads run ahead.
TILE = {8: 32, 4: 16}
SPLIT = {8: 256, 4: 128}
STAGES = {8: 2, 4: 4}


def coded_attention_launch(group: int, layout: RowLayout, query_dtype: torch.dtype) -> SlotAttentionLaunch:
    """The launch over quantised rows: that over rows of the query's dtype, since a tile is computed with as such.

    Without tensor cores a tile is of more rows: those of 128 channels would be too few bytes to read at a time.
    """
    launch = slot_attention_launch(group, layout.head_dim, query_dtype, query_dtype)
    if launch.tensor_cores:
        return launch
    tile = max(8, min(TILE[layout.bits], 8192 // power_of_two(layout.head_dim)))
    split = SPLIT[layout.bits] if group == 1 else launch.split
    return SlotAttentionLaunch(False, 1, split=split, tile=tile, warps=4, stages=STAGES[layout.bits])


def window_launch(group: int, head_dim: int, query_dtype: torch.dtype, rows_dtype: torch.dtype) -> SlotAttentionLaunch:
    """The launch over the window: that over rows as they are, in short splits.

    A program goes through all of its split, and a window is a few dozen rows: in one split of 256 entries it took
    15.6 us on an H100, most of them for nothing.
    """
    launch = slot_attention_launch(group, head_dim, query_dtype, rows_dtype)
    return replace(launch, split=2 * launch.tile)


def coded_attention(
    query: Tensor,
    window: Tensor,
    rows: Tensor | StoredRows,
    code: RowCode,
    slots: Tensor,
    scaling: float,
    out: Tensor | None = None,
    arriving: Arriving | None = None,
) -> Tensor:
    """Exact softmax attention over window rows and quantised rows together.

    Accumulates in float32. On CUDA quantised rows become numbers in registers, and the
    result depends on the named rows in the list's order alone, as with `slot_attention`:
    one launch for the window, one for the rest, one that adds up their parts.

    Args:
        query: [B, H, D], contiguous; float32, float16 or bfloat16; H a multiple of Hkv.
        window: [B, Hkv, W, 2, D] of a float dtype, K and V side by side.
        rows: [B, Hkv, C, 2, P] uint8, quantised; rows, heads and sequences may be strided.
            Or those of a store on the device. Rows that no slot names may hold anything.
        code: Of one layer: factor [Hkv, D].
        slots: int64 [B, Hkv, W + K], contiguous: the first W name window rows, the rest `rows`;
            -1: skip. At least one entry of each head is not skipped.
        scaling: Factor of the scores.
        out: [B, H, D] of the query's dtype, contiguous.
        arriving: Rows that are copied into `rows` before they are read; see `slot_attention`.

    Returns:
        [B, H, D] in the query's dtype: `out` if given; every element is written.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; on the CPU also a slot that does
            not exist. On CUDA, where checking would wait for the device, it is skipped.
    """
    out = _checked_out(query, window, rows, code, slots, out)
    if arriving is not None:
        arriving.check(rows)
    if not query.is_cuda:
        if arriving is not None:
            arriving.fetch(rows)
        _check_slots(window, rows, slots)
        return out.copy_(sparse_attention(query, *kept_rows(window, rows, code, slots, query.dtype), scaling))
    with launching(query.device, "coded_attention"):
        _launch(query, window, rows, code, slots, scaling, out, arriving)
    return out


def coded_attention_reference(
    query: Tensor,
    window: Tensor,
    rows: Tensor | StoredRows,
    code: RowCode,
    slots: Tensor,
    scaling: float,
    out: Tensor | None = None,
) -> Tensor:
    """`coded_attention` in torch, float32, written out. Waits for the device."""
    out = _checked_out(query, window, rows, code, slots, out)
    kept = kept_rows(window, rows, code, slots, torch.float32)
    return out.copy_(sparse_attention_reference(query, *kept, scaling))


def kept_rows(
    window: Tensor, rows: Tensor | StoredRows, code: RowCode, slots: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The named rows side by side, as numbers [B, Hkv, W + K, 2, D] of `dtype`, and which entries name one.

    Arguments as for `coded_attention`; entries that are skipped give 0. Nothing waits for the device.
    """
    near, far = slots[..., : window.shape[2]], slots[..., window.shape[2] :]
    kept = torch.empty(*slots.shape, 2, code.layout.head_dim, dtype=dtype, device=slots.device)
    kept[:, :, : near.shape[2]] = _at(window, near)
    if isinstance(rows, StoredRows):
        coded = torch.zeros(*far.shape, 2, code.layout.part_bytes, dtype=torch.uint8, device=slots.device)
        places = torch.arange(far.shape[2], device=slots.device).expand_as(far)
        gather_rows(rows.table, rows.layer, far, places, coded)
    else:
        coded = _at(rows, far)
    by_head = RowCode(code.layout, code.factor[:, None])
    decode_rows(coded, by_head, kept[:, :, near.shape[2] :])
    valid = slots >= 0
    return kept.masked_fill_(~valid[..., None, None], 0), valid


def _at(rows: Tensor, slots: Tensor) -> Tensor:
    """Rows [B, Hkv, C, 2, N] at `slots` [B, Hkv, K]; those of -1 are any."""
    b = torch.arange(slots.shape[0], device=slots.device)[:, None, None]
    h = torch.arange(slots.shape[1], device=slots.device)[:, None]
    return rows[b, h, slots.clamp(min=0)]


def _check_slots(window: Tensor, rows: Tensor | StoredRows, slots: Tensor) -> None:
    near, far = slots[..., : window.shape[2]], slots[..., window.shape[2] :]
    for part, capacity in ((near, window.shape[2]), (far, rows.shape[2] if isinstance(rows, Tensor) else rows.tokens)):
        if part.numel() and int(part.max()) >= capacity:
            raise ValueError(f"slot {int(part.max())} is beyond the {capacity} rows of a head")


def _launch(
    query: Tensor,
    window: Tensor,
    rows: Tensor | StoredRows,
    code: RowCode,
    slots: Tensor,
    scaling: float,
    out: Tensor,
    arriving: Arriving | None = None,
) -> None:
    if query.numel() == 0:
        return
    batch, heads, head_dim = query.shape
    near = window.shape[2]
    count = slots.shape[2] - near
    kv_heads = window.shape[1]
    group = heads // kv_heads
    launch = coded_attention_launch(group, code.layout, query.dtype)
    near_launch = window_launch(group, head_dim, query.dtype, window.dtype)
    near_splits = -(-near // near_launch.split)
    splits = -(-count // launch.split)
    partials = Partials.empty(query, near_splits + splits)
    launch_partials(query, window, slots[..., :near], scaling, partials, first=0, launch=near_launch)
    if splits:
        layer = segments = segment_tokens = 0
        if isinstance(rows, StoredRows):
            source, capacity, strides = rows.table.addresses, rows.tokens, (0, 0, 0)
            layer, segments, segment_tokens = rows.layer, source.shape[1], rows.table.segment_tokens
            alignment = math.gcd(16, code.layout.part_bytes)
        else:
            source, capacity = rows, rows.shape[2]
            strides = rows.stride(0), rows.stride(1), rows.stride(2)
            alignment = math.gcd(8, rows.data_ptr(), *strides)
        half = head_dim // 2
        kernel, shared = (nibble_vector_kernel if code.layout.bits == 4 else coded_vector_kernel), {}
        if launch.tensor_cores:
            kernel, shared = coded_tensor_core_kernel, {"HEADS": launch.heads}
        pairs = batch * kv_heads
        fetch, constants, fetchers = fetch_arguments(arriving, rows)
        kernel[(fetchers + splits * pairs * -(-group // launch.heads),)](
            *(query, source, slots[..., near:], code.factor, partials.sums, partials.stats),
            *(scaling * math.log2(math.e), kv_heads, count, slots.stride(1), capacity, *strides, layer, segments),
            *(partials.splits, near_splits, splits, pairs, *fetch),
            SEGMENT_TOKENS=segment_tokens,
            BITS=code.layout.bits,
            PART_BYTES=code.layout.part_bytes,
            G=group,
            HALF=half,
            HALF_PAD=max(16, power_of_two(half)),
            SPLIT=launch.split,
            TILE=launch.tile,
            STAGES=launch.stages,
            ALIGNMENT=alignment,
            **constants,
            **shared,
            num_warps=launch.warps,
        )
    launch_combine(partials, out)


def _checked_out(
    query: Tensor, window: Tensor, rows: Tensor | StoredRows, code: RowCode, slots: Tensor, out: Tensor | None
) -> Tensor:
    """The result's tensor, after every argument's shape, dtype and device is checked."""
    if query.dim() != 3 or query.dtype not in FLOATS or not query.is_contiguous():
        raise ValueError(f"query {query.dtype} {tuple(query.shape)} must be float [B, H, D], contiguous")
    batch, heads, head_dim = query.shape
    if window.dim() != 5 or window.dtype not in FLOATS or window.shape[::4] != (batch, head_dim):
        raise ValueError(f"window {window.dtype} {tuple(window.shape)} must be float [{batch}, Hkv, W, 2, {head_dim}]")
    if window.shape[3] != 2 or window.stride()[3:] != (head_dim, 1):
        raise ValueError(f"window with strides {window.stride()} must have K and V of each row side by side")
    kv_heads = window.shape[1]
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"{heads} query heads must be a multiple of the window's {kv_heads} KV heads")
    layout = code.layout
    if layout.head_dim != head_dim or code.factor.shape != (kv_heads, head_dim) or not code.factor.is_contiguous():
        raise ValueError(
            f"a code of {layout.head_dim} channels and factors {tuple(code.factor.shape)} must be of "
            f"{(kv_heads, head_dim)}, contiguous"
        )
    device = rows.device if isinstance(rows, Tensor) else rows.table.addresses.device
    if isinstance(rows, StoredRows):
        rows.table.check(rows.layer, batch, (kv_heads, layout.part_bytes), torch.uint8)
    elif rows.dtype != torch.uint8 or rows.dim() != 5 or rows.shape[:2] != (batch, kv_heads):
        raise ValueError(f"rows {rows.dtype} {tuple(rows.shape)} must be uint8 [{batch}, {kv_heads}, C, 2, P]")
    elif rows.shape[3:] != (2, layout.part_bytes) or rows.stride()[3:] != (layout.part_bytes, 1):
        raise ValueError(f"rows {tuple(rows.shape)} must have 2 x {layout.part_bytes} bytes side by side")
    if slots.dtype != torch.int64 or slots.dim() != 3 or slots.shape[:2] != (batch, kv_heads):
        raise ValueError(f"slots {slots.dtype} {tuple(slots.shape)} must be int64 [{batch}, {kv_heads}, W + K]")
    if slots.shape[2] < window.shape[2] or not slots.is_contiguous():
        raise ValueError(f"slots {tuple(slots.shape)} must be contiguous and name the window's {window.shape[2]} rows")
    if out is None:
        out = torch.empty_like(query)
    elif out.dtype != query.dtype or out.shape != query.shape or not out.is_contiguous():
        raise ValueError(f"out {out.dtype} {tuple(out.shape)} must be {query.dtype} {tuple(query.shape)}, contiguous")
    for name, where in (
        *(("window", window.device), ("rows", device), ("slots", slots.device), ("out", out.device)),
        ("factor", code.factor.device),
    ):
        if where != query.device:
            raise ValueError(f"{name} is on {where}; it must be on {query.device} like the query")
    return out
