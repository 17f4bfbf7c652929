"""Rows of segments that could not be page-locked, exchanged with the device by the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_offload.kernels.append import append_rows
from ds_offload.kernels.device_clock import stamp
from ds_offload.kernels.gather import gather_rows
from ds_offload.kernels.segment_table import SegmentTable
from ds_offload.memory.staging_ring import StagingRing


class StagedRows:
    """What `gather_rows` and `append_rows` do, where some segments are pageable.

    A pageable segment has no address in the store's table, so no kernel ever reaches for
    it: kernels exchange the rows of the others in place, and the CPU those of pageable
    ones, through a `StagingRing`. The same rows arrive at the same slots.

    Hand-overs: as for the kernels, but the host waits for the current stream. Rows of
    pageable segments are in the store when `append` returns.

    Args:
        table: The store's. Its list of segments is shared; pageable ones are told by `add`.
    """

    def __init__(self, table: SegmentTable, device: torch.device) -> None:
        self.ring = StagingRing(device)
        self._table = table
        # Addresses of pageable segments alone, for the CPU.
        addresses = torch.zeros(table.addresses.shape, dtype=torch.int64)
        self._host = SegmentTable(table.tensors, addresses, table.segment_tokens)
        self._numbers: set[tuple[int, int]] = set()

    def add(self, sequence: int, number: int, segment: Tensor) -> None:
        """A sequence's segment of that number is pageable."""
        self._host.addresses[sequence, number] = segment.data_ptr()
        self._numbers.add((sequence, number))

    def drop(self, sequence: int, number: int) -> None:
        """It is not, or no longer: another segment has taken its place."""
        self._host.addresses[sequence, number] = 0
        self._numbers.discard((sequence, number))

    def holds(self, sequence: int, number: int) -> bool:
        """Whether a sequence's segment of that number is pageable."""
        return (sequence, number) in self._numbers

    def gather(
        self,
        layer: int,
        tokens: Tensor,
        slots: Tensor,
        out: Tensor,
        counts: Tensor | None = None,
        timer: Tensor | None = None,
    ) -> None:
        """`gather_rows` for all segments; `out` `[B, Hkv, C, 2, D]` is contiguous.

        The times it gives to `timer` are those of the whole, the CPU's work and waiting included.
        """
        if timer is not None:
            stamp(timer[0])
        staged = self._pageable(tokens)
        if counts is not None:
            staged &= torch.arange(tokens.shape[2], device=tokens.device) < counts[..., None]
        gather_rows(self._table, layer, tokens.masked_fill(staged, -1), slots, out, counts, timer)
        # Which rows they are is known to the device alone: the host waits for it here.
        b, h, n = staged.nonzero(as_tuple=True)
        if len(n):
            heads, capacity = out.shape[1:3]
            places = (b * heads + h) * capacity + slots[b, h, n]
            self._copy(layer, torch.stack((b, h, tokens[b, h, n])).cpu(), places, out)
        if timer is not None and len(n):
            stamp(timer[1])

    def append(self, layer: int, positions: Tensor, rows: Tensor) -> None:
        """`append_rows` for all segments; `rows` `[B, Hkv, 2, D]`."""
        staged = self._pageable(positions[:, None, None])[:, 0, 0]
        append_rows(self._table, layer, positions.masked_fill(staged, -1), rows)
        at = positions.masked_fill(~staged, -1).cpu()
        if (at >= 0).any():
            host = torch.empty(rows.shape, dtype=rows.dtype)
            self.ring.to_host([(rows.contiguous(), host)])
            append_rows(self._host, layer, at, host)

    def _pageable(self, tokens: Tensor) -> Tensor:
        """Which of `tokens` `[B, Hkv, K]` are rows of a segment that no kernel reaches."""
        addresses = self._table.addresses
        numbers = (tokens // self._table.segment_tokens).clamp(0, addresses.shape[1] - 1)
        known = addresses.gather(1, numbers.flatten(1)).view_as(tokens)
        return (known == 0) & (tokens >= 0)

    def _copy(self, layer: int, entries: Tensor, places: Tensor, out: Tensor) -> None:
        """Bring rows to the device.

        Args:
            entries: int64 `[3, n]` on the host: sequence, KV head and token of each.
            places: int64 `[n]` on the device, into the rows of `out` in order.
        """
        # Loads Numba, which takes a second: at first use.
        from ds_offload.kernels.gather_cpu import gather_by_address

        b, h, token = entries
        size, heads = self._table.segment_tokens, out.shape[1]
        row = out.shape[3:]
        row_bytes = row.numel() * out.element_size()
        base = self._host.addresses[b, token // size]
        if not base.all():
            raise ValueError(f"{int((base == 0).sum())} tokens have no segment in the store")
        addresses = base + ((layer * heads + h) * size + token % size) * row_bytes

        def make(first: int, part: Tensor) -> None:
            # Each row is the only one of a segment of its own.
            one = torch.zeros(len(part), 1, 1, dtype=torch.int64)
            words = part.view(torch.int32)[:, None, None]
            gather_by_address(addresses[first : first + len(part), None], one, one, words, 0, 1)

        target = out.view(-1, *row)
        for first, part in self.ring.fill(len(addresses), row_bytes, make):
            rows = part.view(out.dtype).view(-1, *row)
            target.index_copy_(0, places[first : first + len(rows)], rows)
