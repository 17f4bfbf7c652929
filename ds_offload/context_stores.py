"""Where the K/V of B sequences are: on the host, in files or on the device, and dense layers apart."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ds_offload.config import OffloadConfig
from ds_offload.decoder import DecoderStack
from ds_offload.dtypes import RowFormat
from ds_offload.memory.file_segments import FileSegments
from ds_offload.memory.kept_blocks import KeptBlocks
from ds_offload.memory.kv_store import KVStore
from ds_offload.memory.pinned_pool import PinnedPool
from ds_offload.memory.segment_pool import SegmentPool

# What the user is told where the driver refuses to lock more of the K/V.
_PAGEABLE_COST = (
    "the rest of the K/V stays pageable: the CPU copies its rows through a small buffer, and tokens take longer, "
    "with no CUDA graph"
)


class ContextStores:
    """The stores of B sequences and the pool that their segments come from.

    Args:
        config: Resolved for the model.
        capacities: Most tokens (prompt and answer) of each sequence.
        kept: Where the store's page-locked blocks come from and go to; None: the system.

    Attributes:
        store: The K/V of all layers but the dense ones, which have stores of their own on the device.
        layers: All of the model's.
    """

    def __init__(
        self, decoder: DecoderStack, config: OffloadConfig, capacities: list[int], kept: KeptBlocks | None
    ) -> None:
        self.layers = decoder.layers
        self._device = decoder.device
        self._dense_layers = frozenset(config.dense_layers)
        self._kept = kept
        self._on_disk = config.kv_dir is not None
        self._pool: SegmentPool = (
            PinnedPool(decoder.device, _PAGEABLE_COST, kept, in_place=True)
            if config.kv_dir is None
            else FileSegments(config.kv_dir, decoder.device)
        )
        sequences, longest = len(capacities), max(capacities)
        self._offloaded = [n for n in range(decoder.layers) if n not in self._dense_layers]
        self._format = rows = RowFormat.of(config.kv_dtype, decoder.dtype, decoder.head_dim)
        heads: dict[str, Any] = {"kv_heads": decoder.kv_heads, "device": decoder.device}
        self.store = KVStore(
            layers=self._offloaded,
            sequences=sequences,
            head_dim=rows.store_dim,
            dtype=rows.store_dtype,
            pool=self._pool if config.kv_location == "host" else None,
            segment_tokens=int(config.segment_tokens),
            max_tokens=longest,
            **heads,
        )
        self._dense = [
            KVStore(
                layers=sorted(self._dense_layers),
                sequences=1,
                head_dim=rows.head_dim,
                dtype=rows.dtype,
                pool=None,
                segment_tokens=capacity,
                max_tokens=capacity,
                **heads,
            )
            for capacity in capacities
        ]

    @property
    def pinned_bytes(self) -> int:
        """Page-locked bytes of the store, and of the ring through which pageable rows pass."""
        return self._pool.pinned_bytes + self.store.ring_bytes

    @property
    def host_bytes(self) -> int:
        """Host bytes of the store, page-locked or not."""
        return 0 if self._on_disk else self._pool.nbytes

    @property
    def disk_bytes(self) -> int:
        """Bytes of the store in files."""
        return self._pool.nbytes if self._on_disk else 0

    def close(self, keep: bool = True) -> None:
        """Wait for the device, then free everything on host and device; page-locked blocks go to `kept`.

        Args:
            keep: False, after an error: they go back to the system, and what was kept before, too.
        """
        try:
            self._pool.close(keep)
        finally:
            if not keep and self._kept is not None:
                self._kept.release()
            self.store.close()
            self._dense.clear()

    def reserve(self, sequence: int, tokens: int, layer: int | None = None, start: int = 0) -> None:
        """Make room for tokens `start` to `tokens` of `sequence`, in one layer or in all, and wait for it."""
        if layer is None or layer not in self._dense_layers:
            self.store.reserve(sequence, tokens, layer, start)
        if self._dense_layers:
            self._dense[sequence].reserve(0, tokens)

    def prepare(self, sequence: int, tokens: int) -> None:
        """Start making room on the host for `tokens` tokens of `sequence`, all to be reserved before decoding begins.

        Room on the device is made at once: it is zeroed in front of what a prefill hands over.
        """
        self.store.prepare(sequence, tokens)
        if self._dense_layers:
            self._dense[sequence].reserve(0, tokens)

    def has_room(self, sequence: int, tokens: int, layer: int) -> bool:
        """Whether rows of the first `tokens` tokens of `sequence` may be written to `layer` without waiting."""
        store, number = self._store_of(layer, sequence)
        return store.has_room(number, tokens, layer)

    def read_rows(self, layer: int, sequence: int, start: int, out: Tensor) -> None:
        """Copy stored rows of tokens `start` to `start + n` to `out`, on the current stream.

        `out` is `[Hkv, n, 2, D]`, for quantised rows `[Hkv, n, 2, P]` uint8.
        """
        store, number = self._store_of(layer, sequence)
        store.read(layer, number, start, out)

    def dense_rows(self, layer: int, sequence: int, stop: int) -> Tensor:
        """A dense layer's rows `[Hkv, stop, 2, D]` where they lie."""
        return self._dense[sequence].rows(layer, 0, stop)

    def stored_as(self, layer: int, tokens: int) -> tuple[torch.dtype, tuple[int, ...]]:
        """dtype and shape of a layer's stored rows of `tokens` tokens: `[Hkv, T, 2, D]`, quantised `[Hkv, T, 2, P]`."""
        store, _ = self._store_of(layer, 0)
        return store.dtype, store.prompt_shape(tokens)

    def row_parts(self, layer: int, sequence: int, stop: int) -> Iterator[Tensor]:
        """Stored rows of tokens 0 to `stop` where they lie: contiguous `[n, 2, D]`, by KV head, then by token."""
        store, number = self._store_of(layer, sequence)
        return store.parts(layer, number, 0, stop)

    def _store_of(self, layer: int, sequence: int) -> tuple[KVStore, int]:
        """The store that has a layer's rows, and the sequence's number in it."""
        return (self._dense[sequence], 0) if layer in self._dense_layers else (self.store, sequence)
