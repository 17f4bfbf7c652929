"""The full KV cache: K and V of a token side by side, in segments that grow."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ds_offload.kernels.append import append_rows
from ds_offload.kernels.gather import gather_rows
from ds_offload.kernels.segment_table import SegmentTable
from ds_offload.kernels.slot_attention_launch import StoredRows
from ds_offload.memory.file_segments import FileSegments, read_ahead
from ds_offload.memory.row_exchange import exchange_rows, within_reach
from ds_offload.memory.segment_pool import SegmentPool
from ds_offload.memory.staged_rows import StagedRows


class KVStore:
    """K/V of B sequences in segments `[layers, Hkv, S, 2, D]`, on the host or on the device.

    A row is K and V of one token of one KV head: `2 * D` elements in one read. Every sequence
    grows by segments of its own, so unequal lengths waste less than one segment each. On the
    host they are blocks of `pool`, which CUDA kernels reach. From the first one on that they cannot,
    refused by the driver or a file, the store is staged: rows of pageable segments pass through
    a ring of buffers (`StagedRows`), and the host waits for them. Stores may share whole
    segments (`share`); who writes a token that may lie in one calls `unshare` first.

    Hand-overs: the caller orders writers and readers; `append` and `write_prompt` run
    on the current stream, and a row may be gathered on another one only after an
    event recorded behind its write.

    Args:
        layers: The decoder layers whose K/V live here.
        device: The device that computes.
        pool: Host memory; None puts the segments on `device`.
        segment_tokens: S.
    """

    def __init__(
        self,
        *,
        layers: Sequence[int],
        sequences: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        pool: SegmentPool | None,
        segment_tokens: int,
        max_tokens: int,
    ) -> None:
        self.dtype, self.device = dtype, device
        self._index = {layer: n for n, layer in enumerate(layers)}
        self._pool, self._in_files = pool, isinstance(pool, FileSegments)
        self._shape = (len(self._index), kv_heads, segment_tokens, 2, head_dim)
        self._capacity = [0] * sequences
        # Leading segments of each sequence that another store has, too: they are copied before they are written.
        self._shared = [0] * sequences
        self._staged: StagedRows | None = None
        self._refusals = 0
        self._addresses = torch.zeros(sequences, -(-max_tokens // segment_tokens), dtype=torch.int64, device=device)
        self.table = SegmentTable([[] for _ in range(sequences)], self._addresses, segment_tokens)

    def __contains__(self, layer: int) -> bool:
        return layer in self._index

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's K and V of one KV head."""
        return 2 * self._shape[-1] * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of all segments."""
        return sum(segment.nbytes for segments in self.table.tensors for segment in segments)

    @property
    def staged(self) -> bool:
        """Whether some segment is pageable: reading and writing waits for the host then, and no graph may hold it."""
        return self._staged is not None

    @property
    def ring_bytes(self) -> int:
        """Page-locked bytes of the ring through which rows of pageable segments pass; 0 without one."""
        return self._staged.ring.pinned_bytes if self._staged is not None else 0

    def close(self) -> None:
        """Let go of segments and ring. The pool's memory is the pool's; it waits for the device before it goes."""
        self.table.tensors.clear()
        if self._staged is not None:
            self._staged.ring.close()

    @property
    def _layer_bytes(self) -> int:
        return math.prod(self._shape[1:]) * self.dtype.itemsize

    def has_room(self, sequence: int, tokens: int, layer: int) -> bool:
        """Whether rows of the first `tokens` tokens of `sequence` may be written to `layer` without waiting."""
        if not self._index or self._pool is None or self._capacity[sequence] < tokens:
            return not self._index or self._capacity[sequence] >= tokens
        segments, end = self.table.tensors[sequence], self._layer_end(layer)
        return all(self._pool.is_ready(segments[number], end) for number, *_ in self._spans(0, tokens))

    def prepare(self, sequence: int, tokens: int) -> None:
        """Grow `sequence` to hold `tokens` tokens; a background thread makes the new segments ready, layer by layer.

        `reserve` waits for them. All must be reserved before a CUDA graph is captured.

        Raises:
            MemoryError: The memory for another segment is not there.
        """
        missing = -(-max(0, tokens - self._capacity[sequence]) // self.table.segment_tokens)
        for segment in self._allocate(missing) if missing and self._index else ():
            self._add(sequence, segment)

    def reserve(self, sequence: int, tokens: int, layer: int | None = None, start: int = 0) -> None:
        """Have rows of tokens `start` to `tokens` of `sequence` in memory that may be written, of `layer` or of all.

        Raises:
            MemoryError: As `prepare`.
        """
        self.prepare(sequence, tokens)
        pool = self._pool
        if pool is not None and pool.busy:
            end = None if layer is None else self._layer_end(layer)
            for number, *_ in self._spans(start, tokens):
                pool.wait(self.table.tensors[sequence][number], end)
        if pool is not None and pool.refusals > self._refusals:
            self._refusals = pool.refusals
            for other, segments in enumerate(self.table.tensors):
                for number, segment in enumerate(segments):
                    self._place(other, number, segment)

    def share(self, other: KVStore, sequence: int, tokens: int) -> None:
        """Take over the first `tokens` tokens of `other`'s `sequence`; this store's has none yet.

        Whole segments are shared from here on, the rest of the last one is copied. Waits for
        nothing: the caller has waited for the device.

        Raises:
            MemoryError: As `reserve`; what was shared stays so until the pool is closed.
        """
        if not self._index:
            return
        whole, rest = divmod(tokens, self.table.segment_tokens)
        segments = other.table.tensors[sequence]
        for segment in segments[:whole]:
            if self._pool is not None and other._pool is not None:
                self._pool.adopt(other._pool, segment)
            self._add(sequence, segment)
        self._shared[sequence] = whole
        other._shared[sequence] = max(other._shared[sequence], whole)
        if rest:
            self.reserve(sequence, tokens)
            self.table.tensors[sequence][whole][:, :, :rest].copy_(segments[whole][:, :, :rest])

    def shares(self, sequence: int, start: int) -> bool:
        """Whether tokens from `start` on lie in shared segments."""
        return start // self.table.segment_tokens < self._shared[sequence]

    def unshare(self, sequence: int, start: int) -> None:
        """Copy shared segments that hold tokens from `start` on, so that they may be written.

        Waits for nothing, as `share`. What was shared stays held until the pool is closed.
        """
        first = start // self.table.segment_tokens
        segments = self.table.tensors[sequence]
        for number in range(first, self._shared[sequence]):
            segment = self._allocate(1)[0]
            if self._pool is not None:
                self._pool.wait(segment)
            segment.copy_(segments[number])
            segments[number] = segment
            self._place(sequence, number, segment)
        self._shared[sequence] = min(self._shared[sequence], first)

    def shared_bytes(self, tokens: int) -> int:
        """Bytes of the segments that `share` would not copy."""
        return tokens // self.table.segment_tokens * self._shape[0] * self._layer_bytes

    def write_prompt(self, layer: int, sequence: int, start: int, rows: Tensor) -> None:
        """Store rows `[Hkv, n, 2, D]` as tokens `start` to `start + n` of `sequence`, on the current stream.

        `rows` must stay unchanged until the stream has run the copies.
        """
        self._exchange(layer, sequence, start, rows.to(self.dtype), to_store=True)

    def prompt_shape(self, tokens: int) -> tuple[int, int, int, int]:
        """`[Hkv, T, 2, D]` of a layer's rows of T tokens."""
        return (self._shape[1], tokens, *self._shape[3:])

    def parts(self, layer: int, sequence: int, start: int, stop: int) -> Iterator[Tensor]:
        """Rows of tokens `start` to `stop` where they lie: contiguous `[n, 2, D]`, by KV head, then by token."""
        for head in range(self._shape[1]):
            for number, first, last in self._spans(start, stop):
                rows = self.table.tensors[sequence][number][self._index[layer], head : head + 1, first:last]
                if self._in_files:
                    read_ahead(rows)
                yield rows[0]

    def read(self, layer: int, sequence: int, start: int, out: Tensor) -> None:
        """Copy rows of tokens `start` to `start + n` to `out` `[Hkv, n, 2, D]` of the store's dtype.

        The copies run on the current stream; one a head and segment, so that none waits for the host.
        """
        self._exchange(layer, sequence, start, out, to_store=False)

    def append(self, layer: int, positions: Tensor, rows: Tensor) -> None:
        """Store rows `[B, Hkv, 2, D]` of the store's dtype as tokens at `positions` `[B]` int64; see `append_rows`."""
        if self._staged is not None:
            self._staged.append(self._index[layer], positions, rows)
        else:
            append_rows(self.table, self._index[layer], positions, rows)

    def gather(
        self,
        layer: int,
        tokens: Tensor,
        slots: Tensor,
        out: Tensor,
        counts: Tensor | None = None,
        timer: Tensor | None = None,
    ) -> None:
        """Copy rows of `tokens` `[B, Hkv, K]` to `slots` of `out` `[B, Hkv, C, 2, D]`; see `gather_rows`."""
        if self._staged is not None:
            self._staged.gather(self._index[layer], tokens, slots, out, counts, timer)
        else:
            gather_rows(self.table, self._index[layer], tokens, slots, out, counts, timer)

    def stored_rows(self, layer: int) -> StoredRows:
        """A layer's rows for attention that reads them where they lie, on the device."""
        return StoredRows(self.table, self._index[layer], self._shape[1], self._shape[-1], self.dtype)

    def rows(self, layer: int, sequence: int, length: int) -> Tensor:
        """All rows `[Hkv, length, 2, D]` of a sequence that lies in one segment, without a copy."""
        return self.table.tensors[sequence][0][self._index[layer], :, :length]

    def _exchange(self, layer: int, sequence: int, start: int, rows: Tensor, to_store: bool) -> None:
        """Copy `rows` `[Hkv, n, 2, D]` to the store's tokens from `start` on, or those to `rows`."""
        begin = 0
        staged: list[tuple[Tensor, Tensor]] = []
        for number, first, last in self._spans(start, start + rows.shape[1]):
            segment = self.table.tensors[sequence][number]
            stored = within_reach(segment)[self._index[layer], :, first:last]
            part = rows[:, begin : begin + last - first]
            begin += last - first
            if self._in_files and not to_store:
                read_ahead(stored)
            if self._staged is not None and self._staged.holds(sequence, number):
                source, target = (part, stored) if to_store else (stored, part)
                staged += zip(source, target, strict=True)
            else:
                exchange_rows(stored, part, to_store=to_store, on_host=self._pool is not None)
        if self._staged is not None and staged:
            (self._staged.ring.to_host if to_store else self._staged.ring.to_device)(staged)

    def _spans(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Where tokens `start` to `stop` lie: a segment's number, and the first and last of its rows."""
        size = self.table.segment_tokens
        for number in range(start // size, -(-stop // size)):
            base = number * size
            yield number, max(start, base) - base, min(stop, base + size) - base

    def _add(self, sequence: int, segment: Tensor) -> None:
        segments = self.table.tensors[sequence]
        self._place(sequence, len(segments), segment)
        segments.append(segment)
        self._capacity[sequence] += self.table.segment_tokens

    def _place(self, sequence: int, number: int, segment: Tensor) -> None:
        """Let kernels reach a segment, or the CPU where it is pageable."""
        pageable = self._pool is not None and self._pool.left_pageable(segment)
        if pageable:
            self._staged = self._staged or StagedRows(self.table, self.device)
            self._staged.add(sequence, number, segment)
        elif self._staged is not None:
            self._staged.drop(sequence, number)
        # A pageable source makes this copy wait for nothing and return when done.
        self._addresses[sequence, number] = 0 if pageable else segment.data_ptr()

    def _layer_end(self, layer: int) -> int:
        """Bytes of a segment up to the end of a layer's rows."""
        return (self._index[layer] + 1) * self._layer_bytes

    def _allocate(self, count: int) -> list[Tensor]:
        """New segments; those on the host are to be waited for."""
        if self._pool is None:
            return [torch.zeros(self._shape, dtype=self.dtype, device=self.device) for _ in range(count)]
        # No copy crosses one head's rows of a segment.
        sizes = {"grain": self._layer_bytes // self._shape[1], "part": self._layer_bytes}
        blocks = self._pool.begin(self._shape[0] * self._layer_bytes, blocks=count, **sizes)
        return [block.view(self.dtype).view(self._shape) for block in blocks]
