"""Gather of chosen tokens' K/V rows from a segmented host store, in one launch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ds_offload.kernels.triton_runtime import jit, launching, power_of_two, tl


@dataclass(frozen=True)
class SegmentTable:
    """Where the K/V rows of B sequences lie.

    Token t of sequence b is row t % S of segment t // S. The lists and `addresses` may
    be filled in as sequences grow; whoever adds a segment writes its address too.

    Attributes:
        tensors: [B][n] tensors [L, Hkv, S, 2, D], contiguous, of one dtype: pinned host
            memory, plain host memory or device memory.
        addresses: int64 [B, max_segments] on the compute device: each segment's
            `data_ptr()`, a multiple of 16, and 0 where there is none. CUDA kernels
            reach the rows through these, so pinned memory is read in place.
        segment_tokens: S.
    """

    tensors: list[list[Tensor]]
    addresses: Tensor
    segment_tokens: int

    def check(self, layer: int, batch: int, row: tuple[int, int], dtype: torch.dtype) -> None:
        """Raise ValueError unless the table has `batch` sequences with rows of that shape.

        Args:
            layer: Layer that is to be reached.
            batch: B.
            row: (Hkv, D) of the rows to exchange.
            dtype: Their dtype.
        """
        if len(self.tensors) != batch or self.addresses.shape[:1] != (batch,) or self.addresses.dim() != 2:
            raise ValueError(
                f"the table has {len(self.tensors)} sequences and addresses {tuple(self.addresses.shape)}; "
                f"the rows are of {batch}"
            )
        if self.addresses.dtype != torch.int64 or not self.addresses.is_contiguous():
            raise ValueError("addresses must be int64 and contiguous")
        segment = next((segments[0] for segments in self.tensors if segments), None)
        if segment is None:
            return
        shape = (segment.shape[0], row[0], self.segment_tokens, 2, row[1])
        if segment.shape != shape or segment.dtype != dtype:
            raise ValueError(f"segments are {segment.dtype} {tuple(segment.shape)}; the rows need {dtype} {shape}")
        if segment.data_ptr() % 16:
            raise ValueError(f"segments must begin at a multiple of 16 bytes, not at {segment.data_ptr():#x}")
        if not 0 <= layer < segment.shape[0]:
            raise ValueError(f"layer={layer} is not one of the table's {segment.shape[0]} layers")


@dataclass(frozen=True)
class GatherLaunch:
    """Launch of the CUDA kernel: programs, rows each copies at a time, warps of a program."""

    programs: int
    tile_rows: int
    warps: int


def gather_launch(rows: int, row_bytes: int) -> GatherLaunch:
    """The launch for a number of rows (at least 1) of `row_bytes` bytes.

    64 programs of 4 warps saturate a PCIe 5 x16 link (32 nearly do) and leave the other
    multiprocessors to the compute stream. A program has about 16 KiB in flight, so that
    all of them cover the link's latency; entries that are skipped count as rows here, so
    a list of mostly skipped entries runs well below the link's speed.
    """
    tile_rows = max(1, 16384 // (4 * power_of_two(row_bytes // 4)))
    return GatherLaunch(programs=min(64, -(-rows // tile_rows)), tile_rows=tile_rows, warps=4)


@jit
def row_address(
    addresses,
    b,
    h,
    token,
    live,
    layer,
    heads,
    segments,
    SEGMENT_TOKENS: tl.constexpr,
    ROW_BYTES: tl.constexpr,
):
    """Where tokens' rows lie, for use inside a kernel: int64 addresses, 0 where there is no row.

    Args:
        addresses: Pointer to int64 [B, segments], see `SegmentTable`.
        b, h, token: Integer tensors of one shape: sequence, KV head, token number.
        live: bool of that shape; where it is false nothing is read and the result is 0.
    """
    live = live & (token < segments * SEGMENT_TOKENS)
    # A division in 32 bits is several times faster than in 64.
    token = tl.where(live, token, 0).to(tl.int32)
    base = tl.load(addresses + b * segments + token // SEGMENT_TOKENS, mask=live, other=0)
    row = (h.to(tl.int64) + layer * heads) * SEGMENT_TOKENS + token % SEGMENT_TOKENS
    return tl.where(base != 0, base + row * ROW_BYTES, 0)


@jit(do_not_specialize=["rows", "rows_per_program", "layer", "kept", "segments", "capacity"])
def _gather_kernel(
    addresses,
    tokens,
    slots,
    out,
    rows,
    rows_per_program,
    layer,
    heads,
    kept,
    segments,
    capacity,
    stride_b,
    stride_h,
    stride_slot,
    SEGMENT_TOKENS: tl.constexpr,
    ROW_WORDS: tl.constexpr,
    WORDS_PAD: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    """Copies rows as 4-byte words, a contiguous range of entries per program; strides of `out` in words."""
    start = tl.program_id(0) * rows_per_program
    last = tl.minimum(start + rows_per_program, rows)
    word = tl.arange(0, WORDS_PAD)
    while start < last:
        index = start + tl.arange(0, TILE_ROWS)
        token = tl.load(tokens + index, mask=index < last, other=-1)
        slot = tl.load(slots + index, mask=index < last, other=-1)
        live = (token >= 0) & (slot >= 0) & (slot < capacity)
        b = index // kept // heads
        h = index // kept % heads
        address = row_address(addresses, b, h, token, live, layer, heads, segments, SEGMENT_TOKENS, ROW_WORDS * 4)
        copied = (address != 0)[:, None] & (word < ROW_WORDS)[None, :]
        source = address.to(tl.pointer_type(tl.int32))[:, None] + word[None, :]
        row = b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h + slot * stride_slot
        target = out + row[:, None] + word[None, :]
        # Loaded addresses carry no alignment the compiler could see; without the hint it copies word by word.
        source = tl.multiple_of(source, [1, ALIGNMENT])
        target = tl.multiple_of(target, [1, ALIGNMENT])
        tl.store(target, tl.load(source, mask=copied, other=0), mask=copied)
        start += TILE_ROWS


def row_alignment(words: Tensor) -> int:
    """Bytes to which every row of int32 `words` [B, Hkv, C, row words] is aligned: 16, or 4."""
    strides = (words.stride(0), words.stride(1), words.stride(2), words.shape[3])
    return 16 if words.data_ptr() % 16 == 0 and all(stride % 4 == 0 for stride in strides) else 4


def gather_rows(table: SegmentTable, layer: int, tokens: Tensor, slots: Tensor, out: Tensor) -> Tensor:
    """Copy the K/V rows of chosen tokens into chosen slots.

    out[b, h, slots[b, h, i]] = row of token tokens[b, h, i] of sequence b, for every
    entry with tokens >= 0; other slots are left as they are. Ascending tokens are read
    fastest.

    Args:
        table: Where the rows lie.
        layer: Layer to read.
        tokens: int64 [B, Hkv, K] on the compute device; below 0: skip the entry.
        slots: int64 [B, Hkv, K]; distinct among a head's entries that are not skipped.
        out: [B, Hkv, C, 2, D] of the table's dtype on the compute device, changed in
            place; each row contiguous, rows and heads may be strided.

    Returns:
        `out`.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; on the CPU also a token that
            has no segment, or a slot outside `out`. On CUDA, where checking would wait
            for the device, such an entry is skipped.
    """
    _check_gather(table, layer, tokens, slots, out)
    words = out.view(*out.shape[:3], 2 * out.shape[4]).view(torch.int32)
    if out.is_cuda:
        with launching(out.device, "gather_rows"):
            _launch(table, layer, tokens, slots, words)
        return out
    # Loads Numba, which takes a second: at first use.
    from ds_offload.kernels.gather_cpu import gather_by_address

    missing = gather_by_address(table.addresses, tokens, slots, words, layer, table.segment_tokens)
    if missing:
        raise ValueError(f"{missing} tokens have no segment in the table or a slot beyond the {out.shape[2]} of out")
    return out


def _launch(table: SegmentTable, layer: int, tokens: Tensor, slots: Tensor, words: Tensor) -> None:
    rows = tokens.numel()
    if rows == 0:
        return
    launch = gather_launch(rows, 4 * words.shape[3])
    _gather_kernel[(launch.programs,)](
        table.addresses,
        tokens.contiguous(),
        slots.contiguous(),
        words,
        rows,
        -(-rows // launch.programs),
        layer,
        words.shape[1],
        tokens.shape[2],
        table.addresses.shape[1],
        words.shape[2],
        words.stride(0),
        words.stride(1),
        words.stride(2),
        SEGMENT_TOKENS=table.segment_tokens,
        ROW_WORDS=words.shape[3],
        WORDS_PAD=power_of_two(words.shape[3]),
        TILE_ROWS=launch.tile_rows,
        ALIGNMENT=row_alignment(words),
        num_warps=launch.warps,
    )


def gather_rows_reference(table: SegmentTable, layer: int, tokens: Tensor, slots: Tensor, out: Tensor) -> Tensor:
    """`gather_rows` in torch: per sequence and segment one flat `index_select`. Waits for the device."""
    _check_gather(table, layer, tokens, slots, out)
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


def _check_gather(table: SegmentTable, layer: int, tokens: Tensor, slots: Tensor, out: Tensor) -> None:
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
    if table.addresses.device != out.device:
        raise ValueError(f"addresses are on {table.addresses.device}; they must be on {out.device} like out")
