"""A context of many tokens without a prompt: its rows and labels are made up."""

from __future__ import annotations

import ctypes
import itertools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

from ds_offload.calibration import Calibration
from ds_offload.config import OffloadConfig
from ds_offload.decoder import DecoderStack
from ds_offload.dtypes import RowFormat
from ds_offload.kernels.kv_codec import RowCode, encode_rows
from ds_offload.kv_context import KVContext
from ds_offload.memory.kv_store import KVStore
from ds_offload.memory.pinned_pool import PinnedPool
from ds_offload.notices import notice

BLOCK_BYTES = 64 << 20
# Rows that are quantised, to be repeated.
CODED_ROWS = 1 << 16
FILL_THREADS = 16
# Small, so that attention over random rows stays finite in every dtype.
ROW_SCALE = 0.1
LABEL_CHUNK = 4096
SAY_EVERY = 16 << 30


class FilledRows:
    """Segments of random K/V for B sequences, read by several contexts one after another; use as a context manager.

    Page-locking and filling tens of GiB takes far longer than a few steps, so it is done once.
    Contexts append their new tokens' rows to the last segments and change nothing else.

    Args:
        config: Resolved; it says where the rows are and what their dtype is.
        sequences: B.
        capacity: Most tokens of each sequence.
    """

    def __init__(self, decoder: DecoderStack, config: OffloadConfig, sequences: int, capacity: int) -> None:
        self._pool = PinnedPool(decoder.device, in_place=True) if config.kv_location == "host" else None
        self._device = decoder.device
        self._format = RowFormat.of(config.kv_dtype, decoder.dtype, decoder.head_dim)
        self._dtype = self._format.store_dtype
        size = int(config.segment_tokens)
        layers = decoder.layers - len(config.dense_layers)
        self._shape = (layers, decoder.kv_heads, size, 2, self._format.store_dim)
        self._count = sequences * -(-capacity // size) if layers else 0
        self._segments: list[Tensor] = []

    def __enter__(self) -> FilledRows:
        try:
            self._fill()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def nbytes(self) -> int:
        """Bytes of all segments."""
        return self._count * torch.Size(self._shape).numel() * self._dtype.itemsize

    def close(self) -> None:
        """Give the memory back; no context may use it any more."""
        self._segments.clear()
        if self._pool is not None:
            self._pool.close()

    def lend(self, store: KVStore) -> None:
        """Make `store` grow by these segments, from the first on, instead of by new ones."""
        segments = iter(self._segments)
        store._allocate = lambda count: list(itertools.islice(segments, count))  # type: ignore[method-assign]

    def _fill(self) -> None:
        elements = torch.Size(self._shape).numel()
        nbytes = elements * self._dtype.itemsize
        block = self._block(elements)
        numbers = len(block)
        on_device = block.to(self._device) if self._pool is None else None
        said = SAY_EVERY
        with ThreadPoolExecutor(min(FILL_THREADS, os.cpu_count() or 1)) as workers:
            for number in range(self._count):
                if number * nbytes >= said:
                    notice(f"bench decode: {said >> 30} of {self._count * nbytes >> 30} GiB of rows are filled")
                    said += SAY_EVERY
                if on_device is not None:
                    segment = torch.empty(elements, dtype=self._dtype, device=self._device)
                    for part in segment.split(numbers):
                        part.copy_(on_device[: len(part)])
                else:
                    assert self._pool is not None
                    segment = self._pool.allocate(nbytes).view(self._dtype)
                    copies = [workers.submit(_copy, part, block) for part in segment.split(numbers)]
                    for copy in copies:
                        copy.result()
                self._segments.append(segment.view(self._shape))

    def _block(self, elements: int) -> Tensor:
        """Some of the store's elements, a whole number of rows where those are quantised."""
        generator = torch.Generator().manual_seed(0)
        layout = self._format.layout
        if layout is None:
            numbers = min(elements, BLOCK_BYTES // self._dtype.itemsize)
            return torch.empty(numbers).normal_(0, ROW_SCALE, generator=generator).to(self._dtype)
        rows = torch.empty(min(elements // layout.row_bytes, CODED_ROWS), 2, layout.head_dim)
        rows.normal_(0, ROW_SCALE, generator=generator)
        return encode_rows(rows, RowCode(layout, torch.ones(layout.head_dim))).flatten()


def _copy(target: Tensor, source: Tensor) -> None:
    """Fill `target` from the beginning of `source`; releases the interpreter lock, and uses one core."""
    ctypes.memmove(target.data_ptr(), source.data_ptr(), target.nbytes)


@contextmanager
def filled_context(
    decoder: DecoderStack,
    config: OffloadConfig,
    calibration: Calibration,
    rows: FilledRows,
    *,
    sequences: int,
    tokens: int,
    capacity: int,
) -> Iterator[KVContext]:
    """A context whose `sequences` sequences hold `tokens` tokens each and may grow to `capacity`.

    Its rows and its window are those of `rows`, its labels those of random keys.
    """
    with KVContext(decoder, config, calibration, [capacity] * sequences) as context:
        rows.lend(context.store)
        for sequence in range(sequences):
            context.reserve(sequence, capacity)
        _fill_labels(decoder, context, sequences, tokens)
        if context.window_buffer is not None:
            _fill_window(decoder, context, sequences, tokens)
        try:
            yield context
        finally:
            if decoder.device.type == "cuda":
                # The context waits for the device only where it has host memory of its own to give back.
                torch.cuda.synchronize(decoder.device)


def _fill_labels(decoder: DecoderStack, context: KVContext, sequences: int, tokens: int) -> None:
    generator = torch.Generator(decoder.device).manual_seed(0)
    shape = (decoder.kv_heads, min(tokens, LABEL_CHUNK), decoder.head_dim)
    keys = torch.empty(shape, dtype=decoder.dtype, device=decoder.device)
    for layer in range(decoder.layers):
        for sequence in range(sequences):
            for start in range(0, tokens, LABEL_CHUNK):
                keys.normal_(generator=generator)
                context.labels.write_prompt(layer, sequence, start, keys[:, : tokens - start])


def _fill_window(decoder: DecoderStack, context: KVContext, sequences: int, tokens: int) -> None:
    """Bring sinks and recent window on the device, as a prompt of few tokens whose window stands in the same slots."""
    assert context.window_buffer is not None
    sinks, ring = context.window.sinks, context.window.ring
    # The ring's slot of a token is its number modulo the ring's length.
    length = min(tokens, sinks + ring + (tokens - sinks) % ring)
    recent = min(ring, length)
    device = decoder.device
    chosen = torch.cat((torch.arange(length - recent), torch.arange(tokens - recent, tokens)))
    chosen = chosen.to(device).expand(sequences, decoder.kv_heads, -1).contiguous()
    slots = torch.arange(length, device=device).expand_as(chosen).contiguous()
    shape = (*chosen.shape, *context.store.prompt_shape(1)[2:])
    stored = torch.empty(shape, dtype=context.store.dtype, device=device)
    rows = stored if context.codec is None else stored.new_empty((*shape[:4], decoder.head_dim), dtype=decoder.dtype)
    for layer in range(decoder.layers):
        if layer in context.store:
            context.store.gather(layer, chosen, slots, stored)
            for sequence in range(sequences):
                if context.codec is not None:
                    context.codec.decode(layer, stored[sequence], rows[sequence])
                context.window_buffer.fill(layer, sequence, rows[sequence])
