"""Everything that B sequences keep while they are prefilled and decoded, made and freed together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ds_offload.calibration import Calibration
from ds_offload.config import OffloadConfig
from ds_offload.decoder import DecoderStack
from ds_offload.dtypes import torch_dtype
from ds_offload.kernels.label_codec import LabelLayout
from ds_offload.kernels.slot_attention import slot_attention
from ds_offload.kernels.sparse_attention import sparse_attention
from ds_offload.memory.hot_set import HotSet
from ds_offload.memory.kv_store import KVStore
from ds_offload.memory.label_cache import LabelCache
from ds_offload.memory.pinned_pool import PinnedPool
from ds_offload.memory.plan import hot_set_capacity
from ds_offload.memory.window import AttentionWindow
from ds_offload.prefetch.scheduler import PrefetchScheduler
from ds_offload.prefetch.selection import Selector, Step
from ds_offload.prefetch.streams import Faults, Streams


class KVContext:
    """K/V store, labels, hot set, streams and scheduler of B sequences; use as a context manager.

    Args:
        config: Resolved for the model.
        capacities: Most tokens (prompt and answer) of each sequence.
        faults: For the tests of the hand-overs.
    """

    def __init__(
        self,
        decoder: DecoderStack,
        config: OffloadConfig,
        calibration: Calibration,
        capacities: list[int],
        faults: Faults | None = None,
    ) -> None:
        self.window = AttentionWindow(config.sink_tokens, config.recent_tokens)
        self.streams = Streams(decoder.device, faults)
        self._budget = config.budget
        self._capacities = capacities
        self._scaling = decoder.scaling
        self._device = decoder.device
        self._dense_layers = frozenset(config.dense_layers)
        self._pool = PinnedPool(decoder.device)
        sequences, longest = len(capacities), max(capacities)
        offloaded = [n for n in range(decoder.layers) if n not in self._dense_layers]
        dtype = torch_dtype(config.kv_dtype)
        heads: dict[str, Any] = {"kv_heads": decoder.kv_heads, "head_dim": decoder.head_dim, "device": decoder.device}
        self.store = KVStore(
            layers=offloaded,
            sequences=sequences,
            dtype=dtype,
            pool=self._pool if config.kv_location == "host" else None,
            segment_tokens=int(config.segment_tokens),
            max_tokens=longest,
            **heads,
        )
        self._dense = [
            KVStore(
                layers=sorted(self._dense_layers),
                sequences=1,
                dtype=dtype,
                pool=None,
                segment_tokens=capacity,
                max_tokens=capacity,
                **heads,
            )
            for capacity in capacities
        ]
        assert config.label_channels is not None, "the config is resolved"
        self.labels = LabelCache(
            LabelLayout(config.label_channels, config.label_bits),
            calibration.channels,
            calibration.key_mean,
            capacities,
            decoder.device,
        )
        self.hot_set: HotSet | None = None
        if config.kv_location == "host":
            self.hot_set = HotSet(
                self.store,
                layers=offloaded,
                sequences=sequences,
                window=self.window,
                capacity=hot_set_capacity(config.hot_set, self.most_kept, longest, self.window),
                **heads,
            )
        selector = Selector(self.labels, self.window, decoder.scaling, config.budget.top_p)
        self.scheduler = PrefetchScheduler(
            config.prefetch,
            selector=selector,
            store=self.store,
            hot_set=self.hot_set,
            window=self.window,
            streams=self.streams,
            layers=decoder.layers,
            sequences=sequences,
            most_kept=self.most_kept,
            **heads,
        )
        # The new token's K/V of every layer: the writer reads them after the layer has gone on.
        self._new_rows = torch.zeros(
            decoder.layers, sequences, decoder.kv_heads, 2, decoder.head_dim, dtype=decoder.dtype, device=decoder.device
        )

    def __enter__(self) -> KVContext:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def pinned_bytes(self) -> int:
        """Page-locked bytes of the store."""
        return self._pool.pinned_bytes

    @property
    def host_bytes(self) -> int:
        """Host bytes of the store, page-locked or not."""
        return self._pool.nbytes

    def close(self) -> None:
        """Wait for the device, then free everything on host and device."""
        try:
            self._pool.close()
        finally:
            self.store.table.tensors.clear()
            self._dense.clear()

    def reserve(self, sequence: int, tokens: int) -> None:
        """Make room for `tokens` tokens of `sequence`."""
        self.store.reserve(sequence, tokens)
        if self._dense_layers:
            self._dense[sequence].reserve(0, tokens)

    def write_prompt(self, layer: int, sequence: int, rows: Tensor) -> None:
        """Take a prompt's rows `[Hkv, T, 2, D]` of one layer, on the current stream.

        `rows` may be overwritten behind the hand-over `prompt_rows` of the layer's parity.
        """
        if layer in self._dense_layers:
            self._dense[sequence].write_prompt(layer, 0, 0, rows)
            return
        if self.hot_set is not None:
            self.hot_set.fill_window(layer, sequence, rows)
        streams = self.streams
        with streams.producing("kv", layer):
            pass
        with streams.on("writer"):
            streams.wait("kv", layer)
            with streams.producing("prompt_rows", layer % 2):
                self.store.write_prompt(layer, sequence, 0, rows)
                self.labels.write_prompt(layer, sequence, 0, rows[:, :, 0])

    def keep(self, lengths: list[int]) -> list[int]:
        """Candidates that contexts of `lengths` tokens keep at most."""
        return [self._keep(length) for length in lengths]

    @property
    def longest(self) -> int:
        """Most tokens of any sequence."""
        return max(self._capacities)

    @property
    def most_kept(self) -> int:
        """Most candidates any sequence ever keeps."""
        return max(self.keep(self._capacities))

    def append(self, layer: int, key: Tensor, value: Tensor, step: Step) -> None:
        """Take the current token's K and V `[B, Hkv, D]`: into the window now, into store and labels behind it."""
        if layer in self._dense_layers:
            rows = torch.stack((key, value), 2)
            for sequence, dense in enumerate(self._dense):
                dense.append(layer, step.positions[sequence : sequence + 1], rows[sequence : sequence + 1])
            return
        streams = self.streams
        rows = self._new_rows[layer]
        with streams.producing("kv", layer):
            rows[:, :, 0].copy_(key)
            rows[:, :, 1].copy_(value)
        if self.hot_set is not None:
            self.hot_set.append(layer, step.positions, rows)
        positions = streams.lend(step.positions, "writer")
        with streams.on("writer"):
            streams.wait("kv", layer)
            with streams.producing("host_write", layer):
                self.store.append(layer, positions, rows.to(self.store.dtype))
            with streams.producing("label_append", layer):
                self.labels.append(layer, positions, rows[:, :, 0])

    def attend(self, layer: int, query: Tensor, step: Step) -> Tensor:
        """Attention `[B, H, D]` of the current token's query `[B, H, D]` over what its layer keeps."""
        if layer in self._dense_layers:
            each = [self._attend_dense(layer, n, query[n : n + 1], step) for n in range(len(query))]
            return torch.cat(each)
        kept = self.scheduler.keep(layer, query)
        return slot_attention(query, kept.rows, kept.places, self._scaling)

    def kept_tokens(self, length: int) -> int:
        """Tokens a KV head attends to at most in a context of `length` tokens."""
        return self.window.forced(length) + self._keep(length)

    def _keep(self, length: int) -> int:
        return self.window.selected(self._budget.tokens(length), length)

    def _attend_dense(self, layer: int, sequence: int, query: Tensor, step: Step) -> Tensor:
        longest = min(step.max_length, self._capacities[sequence])
        rows = self._dense[sequence].rows(layer, 0, longest)[None]
        valid = torch.arange(longest, device=rows.device) < step.lengths[sequence]
        return sparse_attention(query, rows, valid.expand(rows.shape[:3]), self._scaling)
