"""Attention of one query per sequence over rows read where they stand, named by their slots."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ds_offload.kernels.gather import gather_rows
from ds_offload.kernels.segment_table import SegmentTable
from ds_offload.kernels.slot_attention_kernels import combine_kernel, tensor_core_kernel, vector_kernel
from ds_offload.kernels.sparse_attention import sparse_attention
from ds_offload.kernels.triton_runtime import launching, power_of_two, tl

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# Splits and channels that a program of the second kernel combines at a time: 16 float32 registers a thread,
# and enough programs to spread a few dozen heads over the multiprocessors.
COMBINE_SPLITS = 32
COMBINE_CHANNELS = 64


@dataclass(frozen=True)
class SlotAttentionLaunch:
    """Launch of the first CUDA kernel.

    Attributes:
        tensor_cores: Whether products run on the tensor cores, in the query's dtype.
        heads: Query heads of a group that one program computes.
        split: Entries of the slots list per program.
        tile: Rows read at a time; divides `split`.
        warps: Warps per program.
        stages: Of the pipeliner: how far loads run ahead.
    """

    tensor_cores: bool
    heads: int
    split: int
    tile: int
    warps: int
    stages: int


def slot_attention_launch(
    group: int, head_dim: int, query_dtype: torch.dtype, rows_dtype: torch.dtype
) -> SlotAttentionLaunch:
    """The launch for groups of `group` query heads.

    It depends neither on the number of sequences nor on that of slots, so a sequence
    gives the same bits in every batch, however far its list is padded.

    The tensor cores take at least 16 heads at a time, mostly padding, so one head per
    KV head is multiplied without them; so are float32 and mixed dtypes, whose precision
    they would cut, one head per program.

    On the tensor cores a tile is 16 KiB of K and V, and the stages keep two tiles in flight
    besides the slots of the next. Heads without a group are many and give enough programs
    in splits of 256 rows (32 heads and 8,192 slots: 1,024); groups have fewer KV heads: 128
    rows. Of 96 launches for 32 heads, 8,261 slots and 128 channels of bfloat16 (H100), tiles
    of 8 KiB and two warps were the fastest without tensor cores, 56.4 us.
    """
    tensor_cores = group > 1 and query_dtype == rows_dtype and query_dtype.itemsize == 2
    row_bytes = 2 * rows_dtype.itemsize * power_of_two(head_dim)
    if tensor_cores:
        heads, tile = (16 if group <= 16 else 32), max(32, min(64, 16384 // row_bytes))
        return SlotAttentionLaunch(True, heads, split=128, tile=tile, warps=4, stages=5)
    split, tile = (256 if group == 1 else 128), max(8, min(64, 8192 // row_bytes))
    return SlotAttentionLaunch(False, 1, split=split, tile=tile, warps=2, stages=2)


@dataclass(frozen=True)
class StoredRows:
    """Rows of one layer of a store, read where they lie: slots are token numbers.

    Attributes:
        table: The store's segments.
        layer: Layer of them.
        kv_heads, head_dim, dtype: Of its rows.
    """

    table: SegmentTable
    layer: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def tokens(self) -> int:
        """Tokens that the addresses of a sequence have room for."""
        return self.table.addresses.shape[1] * self.table.segment_tokens


def slot_attention(
    query: Tensor, rows: Tensor | StoredRows, slots: Tensor, scaling: float, out: Tensor | None = None
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

    Returns:
        [B, H, D] in the query's dtype: `out` if given; every element is written.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; on the CPU also a slot beyond C
            or a head without one. On CUDA, where checking would wait for the device, the
            slot is skipped, and the head's result is NaN.
    """
    out = _checked_out(query, rows, slots, out)
    if query.is_cuda:
        with launching(query.device, "slot_attention"):
            _launch(query, rows, slots, scaling, out)
        return out
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


def _launch(query: Tensor, rows: Tensor | StoredRows, slots: Tensor, scaling: float, out: Tensor) -> None:
    if query.numel() == 0:
        return
    group = query.shape[1] // slots.shape[1]
    split = slot_attention_launch(group, query.shape[2], query.dtype, rows.dtype).split
    partials = Partials.empty(query, -(-slots.shape[2] // split))
    launch_partials(query, rows, slots.contiguous(), scaling, partials, first=0)
    launch_combine(partials, out)


@dataclass(frozen=True)
class Partials:
    """What the splits of a slots list come to, of all heads, before they are added up.

    Attributes:
        sums: float32 [B, H, splits, D], sums of V by weight.
        stats: float32 [B, H, splits, 2], the largest score and the sum of the weights.
    """

    sums: Tensor
    stats: Tensor

    @classmethod
    def empty(cls, query: Tensor, splits: int) -> Partials:
        """Room for `splits` splits of each head of a query [B, H, D]."""
        shape = (*query.shape[:2], splits)
        where: dict[str, Any] = {"dtype": torch.float32, "device": query.device}
        return cls(torch.empty(*shape, query.shape[2], **where), torch.empty(*shape, 2, **where))

    @property
    def splits(self) -> int:
        """Splits of each head."""
        return self.stats.shape[2]


def launch_partials(
    query: Tensor, rows: Tensor | StoredRows, slots: Tensor, scaling: float, partials: Partials, first: int
) -> None:
    """Attention over the splits of `slots`, left in `partials` from split `first` on; CUDA, every argument checked.

    Args:
        slots: As for `slot_attention`; the lists of heads may lie apart, each contiguous.
    """
    batch, heads, head_dim = query.shape
    count = slots.shape[2]
    layer = segments = segment_tokens = 0
    if isinstance(rows, StoredRows):
        kv_heads, capacity, source = rows.kv_heads, rows.tokens, rows.table.addresses
        layer, segments, segment_tokens = rows.layer, source.shape[1], rows.table.segment_tokens
        alignment, strides = math.gcd(16, head_dim * rows.dtype.itemsize), (0, 0, 0)
    else:
        kv_heads, capacity, source = rows.shape[1], rows.shape[2], rows
        alignment, strides = row_alignment(rows), (rows.stride(0), rows.stride(1), rows.stride(2))
    group = heads // kv_heads
    launch = slot_attention_launch(group, head_dim, query.dtype, rows.dtype)
    kernel, shared = (tensor_core_kernel, {"HEADS": launch.heads}) if launch.tensor_cores else (vector_kernel, {})
    kernel[(-(-count // launch.split), batch * kv_heads, -(-group // launch.heads))](
        query,
        source,
        slots,
        partials.sums,
        partials.stats,
        scaling * math.log2(math.e),
        kv_heads,
        count,
        slots.stride(1),
        capacity,
        *strides,
        layer,
        segments,
        partials.splits,
        first,
        SEGMENT_TOKENS=segment_tokens,
        ELEMENT=getattr(tl, str(rows.dtype).removeprefix("torch.")),
        G=group,
        D=head_dim,
        D_PAD=max(16, power_of_two(head_dim)),
        SPLIT=launch.split,
        TILE=launch.tile,
        STAGES=launch.stages,
        ALIGNMENT=alignment,
        **shared,
        num_warps=launch.warps,
    )


def launch_combine(partials: Partials, out: Tensor) -> None:
    """Add up the splits of every head into `out` [B, H, D]; CUDA."""
    batch, heads, head_dim = out.shape
    channels = min(COMBINE_CHANNELS, power_of_two(head_dim))
    combine_kernel[(batch * heads, -(-head_dim // channels))](
        *(partials.sums, partials.stats, out, partials.splits),
        D=head_dim,
        SPLITS_TILE=COMBINE_SPLITS,
        CHANNELS_TILE=channels,
        num_warps=4,
    )


def row_alignment(rows: Tensor) -> int:
    """Bytes, at most 16, to which K and V of every row of `rows` [B, Hkv, C, 2, D] are aligned."""
    strides = [n for n, size in zip(rows.stride()[:4], rows.shape, strict=False) if size > 1]
    return math.gcd(16, rows.data_ptr(), *(n * rows.element_size() for n in strides))


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
