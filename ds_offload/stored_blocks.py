"""Stored K/V of one sequence, brought back to the device block by block for a prefill's attention."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ds_offload.decoder import DecoderStack
from ds_offload.kv_context import KVContext
from ds_offload.memory.workspace import stream_tokens


class StoredBlocks:
    """Two buffers `[Hkv, n, 2, D]` of the store's dtype on the device, one filled while the other is attended to.

    Quantised rows `[Hkv, n, 2, P]` become numbers in a third, of the model's dtype, on the compute stream.

    Hand-overs: the prefetch stream fills a buffer behind `kv` of the layer, which lies
    behind everything that was stored before the prefill, behind `prompt_rows` of the piece
    before, and behind `attended` of the buffer's last reader; compute waits for `stored`.

    Args:
        tokens: Most tokens that are ever read back.
    """

    def __init__(self, decoder: DecoderStack, context: KVContext, sequence: int, tokens: int) -> None:
        store = context.store
        self._context = context
        self._sequence = sequence
        self._size = min(tokens, stream_tokens(decoder.kv_heads, store.row_bytes))
        shape = store.prompt_shape(self._size)
        self._buffers = torch.empty(2, *shape, dtype=store.dtype, device=decoder.device)
        self._decoded: Tensor | None = None
        if context.codec is not None:
            numbers = (*shape[:3], decoder.head_dim)
            self._decoded = torch.empty(numbers, dtype=decoder.dtype, device=decoder.device)

    def layer(self, layer: int, length: int, staging: int) -> Iterator[Tensor]:
        """Blocks `[Hkv, m, 2, D]` of a layer's tokens 0 to `length`; one is read until the next is asked for.

        Args:
            staging: Index of the `prompt_rows` that were handed over last before this piece's.
        """
        streams = self._context.streams
        starts = range(0, length, self._size)
        if layer not in self._context.store:
            # A dense layer's rows are on the device, and were written on this stream.
            yield from self._context.dense_rows(layer, self._sequence, length).split(self._size, dim=1)
            return
        if starts:
            self._fetch(layer, 0, length, staging)
        for number in range(len(starts)):
            if number + 1 < len(starts):
                self._fetch(layer, number + 1, length, staging)
            streams.wait("stored", number % 2)
            yield self._numbers(layer, self._block(number, length))
            with streams.producing("attended", number % 2):
                pass

    def after_step(self, layer: int, length: int) -> Iterator[Tensor]:
        """The same between two decode steps, when the last one's rows are in the store for the compute stream."""
        for number in range(2):
            # Makes the prefetch stream wait for compute.
            with self._context.streams.producing("attended", number):
                pass
        return self.layer(layer, length, 0)

    def _fetch(self, layer: int, number: int, length: int, staging: int) -> None:
        streams = self._context.streams
        with streams.on("prefetch"):
            streams.wait("kv", layer)
            streams.wait("prompt_rows", staging)
            streams.wait("attended", number % 2)
            with streams.producing("stored", number % 2):
                self._context.read_rows(layer, self._sequence, number * self._size, self._block(number, length))

    def _numbers(self, layer: int, block: Tensor) -> Tensor:
        """A block's rows as numbers."""
        if self._decoded is None:
            return block
        assert self._context.codec is not None
        return self._context.codec.decode(layer, block, self._decoded[:, : block.shape[1]])

    def _block(self, number: int, length: int) -> Tensor:
        return self._buffers[number % 2, :, : min(self._size, length - number * self._size)]
