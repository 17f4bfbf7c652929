"""The parts that slot attention comes to, split by split, and their sum: launches of its CUDA kernels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ds_offload.kernels.arriving import Arriving, fetch_arguments
from ds_offload.kernels.segment_table import SegmentTable
from ds_offload.kernels.slot_attention_kernels import combine_kernel, slot_tensor_core_kernel, slot_vector_kernel
from ds_offload.kernels.triton_runtime import power_of_two, tl

# Of heads without a group: entries of the slots list per program, and how far loads run ahead.
SPLIT = 128
STAGES = 3
# Splits and channels that a program of the second kernel combines at a time: 32 float32 registers a thread,
# and enough programs to spread a few dozen heads over the multiprocessors.
COMBINE_SPLITS = 64
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
    besides the slots of the next; groups have few KV heads, so a split is 128 rows. Without
    tensor cores tiles of 8 KiB and two warps were the fastest of 96 launches for 32 heads,
    8,261 slots and 128 channels of bfloat16 (H100), in splits of 256 rows. Splits of 128 take
    4 % longer, and end earlier after the last of a step's missing rows has come: 76 us instead
    of 85 where 125 of 8,192 rows a head are missing.
    """
    tensor_cores = group > 1 and query_dtype == rows_dtype and query_dtype.itemsize == 2
    row_bytes = 2 * rows_dtype.itemsize * power_of_two(head_dim)
    if tensor_cores:
        heads, tile = (16 if group <= 16 else 32), max(32, min(64, 16384 // row_bytes))
        return SlotAttentionLaunch(True, heads, split=128, tile=tile, warps=4, stages=5)
    split, tile = (SPLIT if group == 1 else 128), max(8, min(64, 8192 // row_bytes))
    return SlotAttentionLaunch(False, 1, split=split, tile=tile, warps=2, stages=STAGES)


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
    query: Tensor,
    rows: Tensor | StoredRows,
    slots: Tensor,
    scaling: float,
    partials: Partials,
    first: int,
    launch: SlotAttentionLaunch,
    arriving: Arriving | None = None,
) -> None:
    """Attention over the splits of `slots`, left in `partials` from split `first` on; CUDA, every argument checked.

    Args:
        slots: As for `slot_attention`; the lists of heads may lie apart, each contiguous.
        arriving: What must be fetched into `rows`, a tensor, before it is read.
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
    kernel, shared = (
        (slot_tensor_core_kernel, {"HEADS": launch.heads}) if launch.tensor_cores else (slot_vector_kernel, {})
    )
    splits, pairs = -(-count // launch.split), batch * kv_heads
    fetch, constants, fetchers = fetch_arguments(arriving, rows)
    kernel[(fetchers + splits * pairs * -(-group // launch.heads),)](
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
        splits,
        pairs,
        *fetch,
        SEGMENT_TOKENS=segment_tokens,
        ELEMENT=getattr(tl, str(rows.dtype).removeprefix("torch.")),
        G=group,
        D=head_dim,
        D_PAD=max(16, power_of_two(head_dim)),
        SPLIT=launch.split,
        TILE=launch.tile,
        STAGES=launch.stages,
        ALIGNMENT=alignment,
        **constants,
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
