"""Gather of chosen tokens' K/V rows from a segmented host store, in one launch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
        if not 0 <= layer < segment.shape[0]:
            raise ValueError(f"layer={layer} is not one of the table's {segment.shape[0]} layers")


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
            has no segment. On CUDA, where checking would wait for the device, the slot
            of such a token is not written.
    """
    return gather_rows_reference(table, layer, tokens, slots, out)


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
