"""Attention of one query per sequence over rows read where they stand, named by their slots."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ds_offload.kernels.arriving import Arriving
from ds_offload.kernels.gather import gather_rows
from ds_offload.kernels.slot_attention_launch import (
    Partials,
    StoredRows,
    launch_combine,
    launch_partials,
    slot_attention_launch,
)
from ds_offload.kernels.sparse_attention import sparse_attention
from ds_offload.kernels.triton_runtime import launching

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def slot_attention(
    query: Tensor,
    rows: Tensor | StoredRows,
    slots: Tensor,
    scaling: float,
    out: Tensor | None = None,
    arriving: Arriving | None = None,
) -> Tensor:
    """Exact softmax attention over the rows that `slots` names.

    Accumulates in float32. On CUDA the result depends on the named rows in the list's
    order, and on nothing else, bit for bit: not on where rows stand, on the other
    sequences, or on -1s at the end of the list. Two launches, no host synchronisation.

    Args:
        query: [B, H, D], contiguous; float32, float16 or bfloat16; H a multiple of Hkv.
        rows: [B, Hkv, C, 2, D], K and V side by side; float32, float16 or bfloat16; each
            row contiguous, rows, heads and sequences may be strided. Rows that no slot
            names may hold anything. Or the rows of a store on the device.
        slots: int64 [B, Hkv, P]; -1, anywhere in the list: skip. At least one entry of
            each head is not skipped.
        scaling: Factor of the scores, 1 / sqrt(D) as a rule.
        out: [B, H, D] of the query's dtype, contiguous.
        arriving: Rows that are copied into `rows`, a tensor, before they are read. On CUDA the same
            launch copies them, and heads whose rows are there do not wait for those of others.

    Returns:
        [B, H, D] in the query's dtype: `out` if given; every element is written.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; on the CPU also a slot beyond C
            or a head without one. On CUDA, where checking would wait for the device, the
            slot is skipped, and the head's result is NaN.
    """
    out = _checked_out(query, rows, slots, out)
    if arriving is not None:
        arriving.check(rows)
    if query.is_cuda:
        with launching(query.device, "slot_attention"):
            _launch(query, rows, slots, scaling, out, arriving)
        return out
    if arriving is not None:
        arriving.fetch(rows)
    if isinstance(rows, StoredRows):
        rows, slots = _gathered_store(rows, slots)
    _check_slots(rows, slots)
    if query.numel() == 0:
        return out
    valid = slots >= 0
    # Skipped entries read a row that is named: the others may hold a NaN, which masking would not undo.
    named = slots.gather(-1, valid.byte().argmax(-1, keepdim=True))
    return out.copy_(sparse_attention(query, _gathered(rows, torch.where(valid, slots, named)), valid, scaling))


def _gathered(rows: Tensor, slots: Tensor) -> Tensor:
    """Rows at `slots` [B, Hkv, P] as [B, Hkv, P, 2, D]: one flat `index_select` over any strides."""
    sequences, kv_heads, _, _, head_dim = rows.shape
    strides = rows.stride()[:3]
    step = math.gcd(*(n for n, size in zip(strides, rows.shape, strict=False) if size > 1)) or 2 * head_dim
    steps = [n // step for n in strides]
    extent = sum((size - 1) * n for size, n in zip(rows.shape, steps, strict=False)) + 1
    flat = rows.as_strided((extent, 2 * head_dim), (step, 1))
    heads = torch.arange(sequences)[:, None] * steps[0] + torch.arange(kv_heads) * steps[1]
    places = heads[:, :, None] + slots * steps[2]
    return flat.index_select(0, places.flatten()).view(*slots.shape, 2, head_dim)


def _gathered_store(rows: StoredRows, slots: Tensor) -> tuple[Tensor, Tensor]:
    """The named rows of a store side by side, and where each entry of `slots` finds its own."""
    gathered = torch.zeros(*slots.shape, 2, rows.head_dim, dtype=rows.dtype, device=slots.device)
    places = torch.arange(slots.shape[2], device=slots.device).expand_as(slots)
    gather_rows(rows.table, rows.layer, slots, places, gathered)
    return gathered, torch.where(slots >= 0, places, -1)


def _launch(
    query: Tensor,
    rows: Tensor | StoredRows,
    slots: Tensor,
    scaling: float,
    out: Tensor,
    arriving: Arriving | None = None,
) -> None:
    if query.numel() == 0:
        return
    group = query.shape[1] // slots.shape[1]
    launch = slot_attention_launch(group, query.shape[2], query.dtype, rows.dtype)
    partials = Partials.empty(query, -(-slots.shape[2] // launch.split))
    launch_partials(query, rows, slots.contiguous(), scaling, partials, 0, launch, arriving)
    launch_combine(partials, out)


def slot_attention_reference(
    query: Tensor, rows: Tensor | StoredRows, slots: Tensor, scaling: float, out: Tensor | None = None
) -> Tensor:
    """`slot_attention` in torch, float32, written out. Waits for the device."""
    out = _checked_out(query, rows, slots, out)
    if isinstance(rows, StoredRows):
        rows, slots = _gathered_store(rows, slots)
    _check_slots(rows, slots)
    sequences, kv_heads = rows.shape[:2]
    valid = slots >= 0
    b = torch.arange(sequences, device=rows.device)[:, None, None]
    h = torch.arange(kv_heads, device=rows.device)[:, None]
    chosen = rows[b, h, slots.clamp(min=0)].float().masked_fill(~valid[..., None, None], 0)
    keys, values = chosen.unbind(-2)
    scores = scaling * query.float().unflatten(1, (kv_heads, -1)) @ keys.mT
    weights = scores.masked_fill(~valid[:, :, None], -torch.inf).softmax(-1)
    return out.copy_((weights @ values).flatten(1, 2))


def _check_slots(rows: Tensor, slots: Tensor) -> None:
    if slots.numel() and int(slots.max()) >= rows.shape[2]:
        raise ValueError(f"slot {int(slots.max())} is beyond the {rows.shape[2]} rows of a head")
    if not (slots >= 0).any(-1).all():
        raise ValueError("slots name no row for some head; each needs at least one that is not -1")


def _checked_out(query: Tensor, rows: Tensor | StoredRows, slots: Tensor, out: Tensor | None) -> Tensor:
    """The result's tensor, after every argument's shape, dtype and device is checked."""
    if query.dim() != 3 or query.dtype not in FLOATS or not query.is_contiguous():
        raise ValueError(f"query {query.dtype} {tuple(query.shape)} must be float [B, H, D], contiguous")
    batch, heads, head_dim = query.shape
    device = rows.table.addresses.device if isinstance(rows, StoredRows) else rows.device
    if isinstance(rows, StoredRows):
        kv_heads = rows.kv_heads
        if rows.head_dim != head_dim or rows.dtype not in FLOATS:
            raise ValueError(f"stored rows {rows.dtype} of {rows.head_dim} channels must be float of {head_dim}")
        rows.table.check(rows.layer, batch, (kv_heads, head_dim), rows.dtype)
    elif rows.dim() != 5 or rows.dtype not in FLOATS or rows.shape[::4] != (batch, head_dim) or rows.shape[3] != 2:
        raise ValueError(f"rows {rows.dtype} {tuple(rows.shape)} must be float [{batch}, Hkv, C, 2, {head_dim}]")
    elif rows.stride()[3:] != (head_dim, 1):
        raise ValueError(f"rows with strides {rows.stride()} must have K and V of each row side by side")
    else:
        kv_heads = rows.shape[1]
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"{heads} query heads must be a multiple of the rows' {kv_heads} KV heads")
    if slots.dtype != torch.int64 or slots.dim() != 3 or slots.shape[:2] != (batch, kv_heads) or slots.shape[2] < 1:
        raise ValueError(f"slots {slots.dtype} {tuple(slots.shape)} must be int64 [{batch}, {kv_heads}, P >= 1]")
    if out is None:
        out = torch.empty_like(query)
    elif out.dtype != query.dtype or out.shape != query.shape or not out.is_contiguous():
        raise ValueError(f"out {out.dtype} {tuple(out.shape)} must be {query.dtype} {tuple(query.shape)}, contiguous")
    for name, where in (("rows", device), ("slots", slots.device), ("out", out.device)):
        if where != query.device:
            raise ValueError(f"{name} is on {where}; it must be on {query.device} like the query")
    return out
