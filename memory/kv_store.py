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
from ds_offload.memory.pinned_pool import PinnedPool


class KVStore:
    """K/V of B sequences in segments `[layers, Hkv, S, 2, D]`, on the host or on the device.

    A row is K and V of one token of one KV head: `2 * D` elements in one read. Every
    sequence grows by segments of its own, so unequal lengths waste less than one
    segment each. On the host the segments are blocks of `pool`, page-locked for CUDA.

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
        pool: PinnedPool | None,
        segment_tokens: int,
        max_tokens: int,
    ) -> None:
        self.dtype = dtype
        self.device = device
        self._index = {layer: n for n, layer in enumerate(layers)}
        self._pool = pool
        self._shape = (len(self._index), kv_heads, segment_tokens, 2, head_dim)
        self._capacity = [0] * sequences
        self._ahead = 0
        most = -(-max_tokens // segment_tokens)
        self._addresses = torch.zeros(sequences, most, dtype=torch.int64, device=device)
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
    def _segment_bytes(self) -> int:
        return math.prod(self._shape) * self.dtype.itemsize

    @property
    def _grain(self) -> int:
        """Bytes of one head's rows of a segment: no copy crosses them."""
        return math.prod(self._shape[2:]) * self.dtype.itemsize

    def has_room(self, sequence: int, tokens: int) -> bool:
        """Whether `tokens` tokens of `sequence` need no further segment."""
        return not self._index or self._capacity[sequence] >= tokens

    def prepare(self, sequence: int, tokens: int) -> None:
        """Start making the segments that `reserve` will want for `tokens` tokens, on a background thread.

        All of them must be reserved before a CUDA graph is captured. With the store on the
        device nothing happens.
        """
        if self._pool is None or not self._index:
            return
        missing = -(-max(0, tokens - self._capacity[sequence]) // self.table.segment_tokens) - self._ahead
        if missing > 0:
            self._pool.prepare(self._segment_bytes, blocks=missing, grain=self._grain)
            self._ahead += missing

    def reserve(self, sequence: int, tokens: int) -> None:
        """Grow `sequence` to hold `tokens` tokens.

        Raises:
            MemoryError: The memory for another segment is not there.
        """
        if not self._index:
            return
        segments = self.table.tensors[sequence]
        while self._capacity[sequence] < tokens:
            segment = self._allocate()
            # A pageable source makes this copy wait for nothing and return when done.
            self._addresses[sequence, len(segments)] = segment.data_ptr()
            segments.append(segment)
            self._capacity[sequence] += self.table.segment_tokens

    def write_prompt(self, layer: int, sequence: int, start: int, rows: Tensor) -> None:
        """Store rows `[Hkv, n, 2, D]` as tokens `start` to `start + n` of `sequence`, on the current stream.

        `rows` must stay unchanged until the stream has run the copies.
        """
        rows = rows.to(self.dtype)
        begin = 0
        for number, first, last in self._spans(start, start + rows.shape[1]):
            target = self.table.tensors[sequence][number][self._index[layer], :, first:last]
            source = rows[:, begin : begin + last - first]
            begin += last - first
            if self._pool is None or rows.device.type == "cpu":
                target.copy_(source)
            else:
                # One contiguous copy a head: a strided one would be staged on the host.
                for to, of in zip(target, source, strict=True):
                    to.copy_(of, non_blocking=True)

    def prompt_shape(self, tokens: int) -> tuple[int, int, int, int]:
        """`[Hkv, T, 2, D]` of a layer's rows of T tokens."""
        return (self._shape[1], tokens, *self._shape[3:])

    def parts(self, layer: int, sequence: int, start: int, stop: int) -> Iterator[Tensor]:
        """Rows of tokens `start` to `stop` where they lie: contiguous `[n, 2, D]`, by KV head, then by token."""
        for head in range(self._shape[1]):
            for number, first, last in self._spans(start, stop):
                yield self.table.tensors[sequence][number][self._index[layer], head, first:last]

    def read(self, layer: int, sequence: int, start: int, out: Tensor) -> None:
        """Copy rows of tokens `start` to `start + n` to `out` `[Hkv, n, 2, D]` of the store's dtype.

        The copies run on the current stream; one a head and segment, so that none waits for the host.
        """
        begin = 0
        for number, first, last in self._spans(start, start + out.shape[1]):
            rows = self.table.tensors[sequence][number][self._index[layer], :, first:last]
            target = out[:, begin : begin + last - first]
            if self._pool is None or out.device.type == "cpu":
                target.copy_(rows)
            else:
                for to, of in zip(target, rows, strict=True):
                    to.copy_(of, non_blocking=True)
            begin += last - first

    def append(self, positions: Tensor, rows: Tensor, layer: int | None = None) -> None:
        """Store tokens at `positions` `[B]` int64, on the current stream.

        Args:
            rows: `[N, B, Hkv, 2, D]` of the store's dtype, of every layer in order, or of `layer` alone.
        """
        append_rows(self.table, 0 if layer is None else self._index[layer], positions, rows)

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
        gather_rows(self.table, self._index[layer], tokens, slots, out, counts, timer)

    def stored_rows(self, layer: int) -> StoredRows:
        """A layer's rows for attention that reads them where they lie, on the device."""
        return StoredRows(self.table, self._index[layer], self._shape[1], self._shape[-1], self.dtype)

    def rows(self, layer: int, sequence: int, length: int) -> Tensor:
        """All rows `[Hkv, length, 2, D]` of a sequence that lies in one segment, without a copy."""
        return self.table.tensors[sequence][0][self._index[layer], :, :length]

    def _spans(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Where tokens `start` to `stop` lie: a segment's number, and the first and last of its rows."""
        size = self.table.segment_tokens
        for number in range(start // size, -(-stop // size)):
            base = number * size
            yield number, max(start, base) - base, min(stop, base + size) - base

    def _allocate(self) -> Tensor:
        if self._pool is None:
            return torch.zeros(self._shape, dtype=self.dtype, device=self.device)
        block = self._pool.allocate(self._segment_bytes, grain=self._grain)
        self._ahead = max(0, self._ahead - 1)
        return block.view(self.dtype).view(self._shape)
