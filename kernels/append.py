"""Append of new tokens' K/V rows to the segmented host store, without waiting for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_offload.kernels.dependent_launch import follow, step_kernel
from ds_offload.kernels.segment_table import SegmentTable, row_address
from ds_offload.kernels.triton_runtime import launching, power_of_two, tl


@step_kernel(do_not_specialize=["layer", "segments"])
def _append_kernel(
    addresses,
    positions,
    rows,
    layer,
    heads,
    segments,
    SEGMENT_TOKENS: tl.constexpr,
    ROW_WORDS: tl.constexpr,
    WORDS_PAD: tl.constexpr,
):
    """One program copies the row of one sequence and KV head, as 4-byte words."""
    follow()
    unit = tl.program_id(0) + tl.arange(0, 1)
    b = unit // heads
    position = tl.load(positions + b)
    address = row_address(
        addresses, b, unit % heads, position, position >= 0, layer, heads, segments, SEGMENT_TOKENS, ROW_WORDS * 4
    )
    word = tl.arange(0, WORDS_PAD)
    copied = (address != 0)[:, None] & (word < ROW_WORDS)[None, :]
    value = tl.load(rows + (unit.to(tl.int64) * ROW_WORDS)[:, None] + word[None, :], mask=copied, other=0)
    tl.store(address.to(tl.pointer_type(tl.int32))[:, None] + word[None, :], value, mask=copied)


def append_rows(table: SegmentTable, layer: int, positions: Tensor, rows: Tensor) -> None:
    """Write one token's K/V row per sequence and KV head into a layer of the store.

    On CUDA one launch writes pinned memory directly; the rows are in host memory once
    an event recorded after it has completed.

    Args:
        table: Where the rows lie; the segment of each position exists.
        layer: Of the table's, the one to write.
        positions: int64 [B] on the compute device, token number per sequence; below 0:
            skip the sequence.
        rows: [B, Hkv, 2, D] of the table's dtype on the compute device.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; on the CPU also a position
            that has no segment. On CUDA, where checking would wait for the device,
            such a row is not written.
    """
    if not rows.is_cuda:
        append_rows_reference(table, layer, positions, rows)
        return
    _check_append(table, layer, positions, rows)
    with launching(rows.device, "append_rows"):
        _launch(table, layer, positions, rows)


def _launch(table: SegmentTable, layer: int, positions: Tensor, rows: Tensor) -> None:
    batch, kv_heads, _, dim = rows.shape
    if batch * kv_heads == 0:
        return
    words = 2 * dim * rows.element_size() // 4
    _append_kernel[(batch * kv_heads,)](
        table.addresses,
        positions.contiguous(),
        rows.contiguous().view(batch, kv_heads, 2 * dim).view(torch.int32),
        layer,
        kv_heads,
        table.addresses.shape[1],
        SEGMENT_TOKENS=table.segment_tokens,
        ROW_WORDS=words,
        WORDS_PAD=power_of_two(words),
        num_warps=1,
    )


def append_rows_reference(table: SegmentTable, layer: int, positions: Tensor, rows: Tensor) -> None:
    """`append_rows` in torch, one copy per sequence. Waits for the device."""
    _check_append(table, layer, positions, rows)
    for b, position in enumerate(positions.tolist()):
        if position < 0:
            continue
        segment, offset = divmod(position, table.segment_tokens)
        if segment >= len(table.tensors[b]):
            raise ValueError(f"sequence {b}: token {position} has no segment; it has {len(table.tensors[b])}")
        table.tensors[b][segment][layer, :, offset].copy_(rows[b])


def _check_append(table: SegmentTable, layer: int, positions: Tensor, rows: Tensor) -> None:
    if rows.dim() != 4 or rows.shape[2] != 2:
        raise ValueError(f"rows {tuple(rows.shape)} must be [B, Hkv, 2, D]")
    batch, kv_heads, _, dim = rows.shape
    if positions.dtype != torch.int64 or positions.shape != (batch,):
        raise ValueError(f"positions {positions.dtype} {tuple(positions.shape)} must be int64 ({batch},)")
    table.check(layer, batch, (kv_heads, dim), rows.dtype)
    for name, value in (("positions", positions), ("addresses", table.addresses)):
        if value.device != rows.device:
            raise ValueError(f"{name} on {value.device} must be on {rows.device} like the rows")
