"""Gather of chosen tokens' K/V rows from a segmented host store, in one launch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ds_offload.kernels.gather_kernels import gather_kernel
from ds_offload.kernels.segment_table import SegmentTable
from ds_offload.kernels.triton_runtime import launching, power_of_two


@dataclass(frozen=True)
class GatherLaunch:
    """Launch of the CUDA kernel: programs, rows that one copies at a time, its warps."""

    programs: int
    tile_rows: int
    warps: int


def gather_launch(pairs: int, kept: int, row_bytes: int, tile_bytes: int = 16384) -> GatherLaunch:
    """The launch for lists of `kept` entries of `pairs` sequences and KV heads, each at least 1.

    64 programs of 4 warps saturate a PCIe 5 x16 link (32 nearly do) and leave the other
    multiprocessors to the compute stream. A program has about `tile_bytes` in flight, so that
    all of them cover the link's latency.
    """
    tile_rows = max(1, tile_bytes // (4 * power_of_two(row_bytes // 4)))
    return GatherLaunch(min(64, pairs * -(-kept // tile_rows)), tile_rows, warps=4)


def row_alignment(words: Tensor) -> int:
    """Bytes to which every row of int32 `words` [B, Hkv, C, row words] is aligned: 16, or 4."""
    strides = (words.stride(0), words.stride(1), words.stride(2), words.shape[3])
    return 16 if words.data_ptr() % 16 == 0 and all(stride % 4 == 0 for stride in strides) else 4


def gather_rows(
    table: SegmentTable,
    layer: int,
    tokens: Tensor,
    slots: Tensor,
    out: Tensor,
    counts: Tensor | None = None,
    timer: Tensor | None = None,
) -> Tensor:
    """Copy the K/V rows of chosen tokens into chosen slots.

    out[b, h, slots[b, h, i]] = row of token tokens[b, h, i] of sequence b, for every
    entry with tokens >= 0 and i < counts[b, h]; other slots are left as they are.
    Ascending tokens are read fastest, and a list without entries to skip.

    Args:
        table: Where the rows lie.
        layer: Layer to read.
        tokens: int64 [B, Hkv, K] on the compute device; below 0: skip the entry.
        slots: int64 [B, Hkv, K]; distinct among a head's entries that are not skipped.
        out: [B, Hkv, C, 2, D] of the table's dtype on the compute device, changed in
            place; each row contiguous, rows and heads may be strided.
        counts: int32 [B, Hkv], entries of each head that are looked at; None is all.
        timer: int64 [2] on the CUDA device: where a row is copied, the first becomes the
            lower of itself and the time the copying began, the second the higher of itself
            and the time it ended, in nanoseconds of the device's clock.

    Returns:
        `out`.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; on the CPU also a token that
            has no segment, or a slot outside `out`. On CUDA, where checking would wait
            for the device, such an entry is skipped.
    """
    check_gather(table, layer, tokens, slots, out, counts, timer)
    words = out.view(*out.shape[:3], 2 * out.shape[4]).view(torch.int32)
    if out.is_cuda:
        with launching(out.device, "gather_rows"):
            _launch(table, layer, tokens, slots, words, counts, timer)
        return out
    # Loads Numba, which takes a second: at first use.
    from ds_offload.kernels.gather_cpu import gather_by_address

    tokens = _listed(tokens, counts)
    missing = gather_by_address(table.addresses, tokens, slots, words, layer, table.segment_tokens)
    if missing:
        raise ValueError(f"{missing} tokens have no segment in the table or a slot beyond the {out.shape[2]} of out")
    return out


def _listed(tokens: Tensor, counts: Tensor | None) -> Tensor:
    """`tokens` with -1 behind the first `counts` of each head."""
    if counts is None:
        return tokens
    return tokens.masked_fill(torch.arange(tokens.shape[2], device=tokens.device) >= counts[..., None], -1)


def _launch(
    table: SegmentTable,
    layer: int,
    tokens: Tensor,
    slots: Tensor,
    words: Tensor,
    counts: Tensor | None = None,
    timer: Tensor | None = None,
) -> None:
    batch, heads, kept = tokens.shape
    if tokens.numel() == 0:
        return
    launch = gather_launch(batch * heads, kept, 4 * words.shape[3])
    gather_kernel[(launch.programs,)](
        table.addresses,
        tokens.contiguous(),
        slots.contiguous(),
        counts,
        words,
        timer,
        batch * heads,
        layer,
        heads,
        kept,
        table.addresses.shape[1],
        words.shape[2],
        words.stride(0),
        words.stride(1),
        words.stride(2),
        COUNTED=counts is not None,
        TIMED=timer is not None,
        PAIRS_PAD=power_of_two(batch * heads),
        SEGMENT_TOKENS=table.segment_tokens,
        ROW_WORDS=words.shape[3],
        WORDS_PAD=power_of_two(words.shape[3]),
        TILE_ROWS=launch.tile_rows,
        ALIGNMENT=row_alignment(words),
        num_warps=launch.warps,
    )


def gather_rows_reference(
    table: SegmentTable,
    layer: int,
    tokens: Tensor,
    slots: Tensor,
    out: Tensor,
    counts: Tensor | None = None,
    timer: Tensor | None = None,
) -> Tensor:
    """`gather_rows` in torch: per sequence and segment one flat `index_select`. Waits for the device; times nothing."""
    check_gather(table, layer, tokens, slots, out, counts, timer)
    tokens = _listed(tokens, counts)
    size = table.segment_tokens
    kv_heads, capacity, dim = out.shape[1], out.shape[2], out.shape[4]
    heads = torch.arange(kv_heads)[:, None]
    for b, segments in enumerate(table.tensors):
        token = tokens[b].cpu()
        target = (heads * capacity + slots[b].cpu()).flatten()
        segment_ids = token.div(size, rounding_mode="floor").flatten()
        rows = (heads * size + token % size).flatten()
        wanted = segment_ids >= 0
        for n in segment_ids[wanted].unique().tolist():
            if n >= len(segments):
                raise ValueError(f"sequence {b}: token {n * size} or above has no segment; it has {len(segments)}")
            chosen = (segment_ids == n).nonzero().flatten()
            source = segments[n][layer].view(kv_heads * size, 2 * dim)
            picked = source.index_select(0, rows[chosen].to(source.device)).to(out.device)
            flat = target[chosen].to(out.device)
            out[b][flat // capacity, flat % capacity] = picked.unflatten(1, (2, dim))
    return out


def check_gather(
    table: SegmentTable,
    layer: int,
    tokens: Tensor,
    slots: Tensor,
    out: Tensor,
    counts: Tensor | None,
    timer: Tensor | None,
) -> None:
    """Raise ValueError unless shapes, dtypes and devices are those of `gather_rows`."""
    if out.dim() != 5 or out.shape[3] != 2 or out.stride()[3:] != (out.shape[4], 1):
        raise ValueError(f"out {tuple(out.shape)} must be [B, Hkv, C, 2, D] with contiguous rows")
    batch, kv_heads, _, _, dim = out.shape
    for name, value in (("tokens", tokens), ("slots", slots)):
        if value.dtype != torch.int64 or value.dim() != 3 or value.shape[:2] != (batch, kv_heads):
            raise ValueError(f"{name} {value.dtype} {tuple(value.shape)} must be int64 [{batch}, {kv_heads}, K]")
        if value.device != out.device:
            raise ValueError(f"{name} is on {value.device}; it must be on {out.device} like out")
    if tokens.shape != slots.shape:
        raise ValueError(f"tokens {tuple(tokens.shape)} and slots {tuple(slots.shape)} must have one shape")
    table.check(layer, batch, (kv_heads, dim), out.dtype)
    if counts is not None and (
        counts.dtype != torch.int32 or counts.shape != tokens.shape[:2] or not counts.is_contiguous()
    ):
        raise ValueError(f"counts {counts.dtype} {tuple(counts.shape)} must be int32 {(batch, kv_heads)}, contiguous")
    if timer is not None and (timer.dtype != torch.int64 or timer.shape != (2,) or not timer.is_cuda):
        raise ValueError(f"timer {timer.dtype} {tuple(timer.shape)} on {timer.device} must be int64 (2,) on CUDA")
    for name, given in (("addresses", table.addresses), ("counts", counts), ("timer", timer)):
        if given is not None and given.device != out.device:
            raise ValueError(f"{name} is on {given.device}; it must be on {out.device} like out")
