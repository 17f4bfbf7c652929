"""A prompt, layer by layer: exact causal attention, K/V and labels leaving as each layer ends."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ds_offload.decoder import DecoderStack, Rope
from ds_offload.hidden_states import HiddenStates
from ds_offload.kv_context import KVContext
from ds_offload.memory.workspace import WRITTEN_SEGMENTS, chunk_tokens, piece_tokens
from ds_offload.prefill_attention import causal_attention_, piece_attention_
from ds_offload.prefill_checkpoint import PrefillCheckpoint
from ds_offload.prefill_layers import PrefillLayers
from ds_offload.prefill_pace import Pace
from ds_offload.prefill_pace import ProgressCallback as ProgressCallback
from ds_offload.stored_blocks import StoredBlocks


def prefill(
    decoder: DecoderStack,
    context: KVContext,
    sequence: int,
    ids: list[int],
    on_progress: ProgressCallback | None = None,
    *,
    start: int = 0,
    streamed: bool = False,
    checkpoint: PrefillCheckpoint | None = None,
) -> Tensor:
    """Run tokens through all layers and leave their K/V, labels and window in `context`.

    The last layers' rows may still be on their way when the logits are there: whoever reads the store, the labels or
    the window next joins the streams first (`Streams.join`), as a decode step and another prefill do.

    A prompt goes through a layer as a whole: its hidden states, its queries and two layers'
    K/V are on the device. Where it is streamed, or continues a sequence, it goes through
    the layer in pieces, whose queries attend to the tokens before them as the store has
    them. Nothing on the device grows with the number of layers, and nothing is T x T.

    Args:
        sequence: Which of the context's sequences this is.
        ids: Token ids to add, at least one.
        on_progress: Called with ("prefill", tokens done, tokens): the work done so far, as
            a share of `ids`.
        start: Tokens of the sequence whose K/V are in the store already, from an earlier
            prefill or from decode steps. With a RoPE whose frequencies depend on the length,
            theirs were turned by those of the shorter sequence, as transformers' cache does.
        streamed: Keep the hidden states on the host, and only one piece on the device.
        checkpoint: Where finished layers are kept, and taken up from; it is deleted at the end.

    Returns:
        Logits `[vocab]` float32 of the last token.

    Raises:
        ValueError: No ids, a negative start, or a checkpoint of a sequence that is continued.
    """
    if not ids or start < 0 or (start and checkpoint is not None):
        raise ValueError(
            f"{len(ids)} ids, start={start}, checkpoint={checkpoint}; a prefill takes at least one id, "
            "a start of at least 0, and a checkpoint only from the first token on"
        )
    context.prepare(sequence, start + len(ids))
    # Behind whatever wrote rows, labels or window before.
    context.streams.join()
    with HiddenStates(decoder, len(ids), streamed) as states:
        done = checkpoint.resume(context, sequence, states.whole) if checkpoint is not None else 0
        pace = Pace(decoder, len(ids), start, done, on_progress)
        work = _Prefill(decoder, context, sequence, ids, start, streamed, states, pace)
        if not done:
            work.embed()
        for layer in range(done, decoder.layers):
            work.run(layer)
            if checkpoint is not None and layer + 1 < decoder.layers and checkpoint.due():
                work.write()
                pace.drain()
                checkpoint.save(context, sequence, states.whole, layer + 1)
            pace.finish_layer()
        work.write()
        logits = decoder.logits(states.load(slice(-1, None)))[0]
        pace.finish()
    if checkpoint is not None:
        checkpoint.delete()
    return logits


class _Prefill:
    """Buffers of one prefill, and one layer's way through them."""

    def __init__(
        self,
        decoder: DecoderStack,
        context: KVContext,
        sequence: int,
        ids: list[int],
        start: int,
        streamed: bool,
        states: HiddenStates,
        pace: Pace,
    ) -> None:
        self._decoder, self._context, self._sequence = decoder, context, sequence
        self._layers = PrefillLayers(decoder)
        self._ids, self._start, self._states, self._pace = ids, start, states, pace
        length, device = len(ids), decoder.device
        size = min(length, piece_tokens(decoder.heads, decoder.head_dim)) if streamed or start else length
        self._pieces = [slice(first, min(first + size, length)) for first in range(0, length, size)]
        self._step = chunk_tokens(decoder.hidden_size, decoder.intermediate_size, decoder.dtype.itemsize)
        heads: dict[str, Any] = {"dtype": decoder.dtype, "device": device}
        self._queries = torch.empty(size, decoder.heads, decoder.head_dim, **heads)
        # K/V of two pieces, or of one in two layers: one leaves while the next is made.
        self._staging = [torch.empty(decoder.kv_heads, size, 2, decoder.head_dim, **heads) for _ in range(2)]
        context.streams.hold(*self._staging)
        self._turn = 0
        self._unwritten: list[tuple[int, int, Tensor, int]] = []
        most = start + self._pieces[-1].start
        self._stored = StoredBlocks(decoder, context, sequence, most) if most else None
        # The same in every layer where there is one piece; else made for each.
        self._rope = self._turned(self._pieces[0]) if len(self._pieces) == 1 else None

    def embed(self) -> None:
        """Fill the hidden states with the tokens' embeddings."""
        for first in range(0, len(self._ids), self._step):
            chunk = slice(first, min(first + self._step, len(self._ids)))
            tokens = torch.tensor(self._ids[chunk], dtype=torch.int64, device=self._decoder.device)
            self._states.save(chunk, self._decoder.embed(tokens))

    def run(self, layer: int) -> None:
        """Put all hidden states through one layer."""
        for piece in self._pieces:
            hidden = self._states.load(piece)
            self._run(layer, piece, hidden)
            self._states.save(piece, hidden)

    def _run(self, layer: int, piece: slice, hidden: Tensor) -> None:
        decoder, context, pace = self._decoder, self._context, self._pace
        length, first = len(hidden), self._start + piece.start
        queries, rows = self._queries[:length], self._staging[self._turn][:, :length]
        chunks = [slice(begin, min(begin + self._step, length)) for begin in range(0, length, self._step)]
        cos, sin = self._rope or self._turned(piece)
        self.write((self._turn,))
        context.streams.wait("prompt_rows", self._turn)
        with context.streams.producing("kv", layer):
            for chunk in chunks:
                rope = cos[chunk], sin[chunk]
                self._layers.project(layer, hidden[chunk], rope, queries[chunk], rows[:, chunk])
        self._unwritten.append((layer, first, rows, self._turn))
        # Rows leave beside the matrix products that follow: beside attention they cost four times as much.
        with context.streams.producing("leaving", layer):
            if first:
                assert self._stored is not None
                earlier = self._stored.layer(layer, first, 1 - self._turn)
                piece_attention_(queries, rows, earlier, decoder.scaling, pace.attended)
            else:
                causal_attention_(queries, rows, decoder.scaling, pace.attended)
        for chunk in chunks:
            self._layers.finish_(layer, hidden[chunk], queries[chunk].flatten(1))
            pace.projected(chunk.stop - chunk.start)
        # Thousands of copies take the host milliseconds to issue: the device has the rest of the layer meanwhile.
        # Of more pieces the next reads these rows back; else they may wait for their part of the store to be pinned.
        self.write((0, 1) if len(self._pieces) > 1 else ())
        self._turn = 1 - self._turn

    def write(self, awaited: tuple[int, ...] = (0, 1)) -> None:
        """Hand rows that have not left yet to the writer, where there is room for them.

        For rows in the staging buffers `awaited` the host waits until there is.
        """
        context = self._context
        step = WRITTEN_SEGMENTS * context.store.table.segment_tokens
        waiting, self._unwritten = self._unwritten, []
        for layer, first, rows, staging in waiting:
            if staging not in awaited and not context.has_room(self._sequence, first + rows.shape[1], layer):
                self._unwritten.append((layer, first, rows, staging))
                continue
            for begin in range(0, rows.shape[1], step):
                part = rows[:, begin : begin + step]
                context.reserve(self._sequence, first + begin + part.shape[1], layer, first + begin)
                context.write_prompt(layer, self._sequence, part, start=first + begin, staging=staging)

    def _turned(self, piece: slice) -> Rope:
        """RoPE of a piece; its frequencies are those of the whole sequence where they depend on the length."""
        length = self._start + len(self._ids)
        positions = torch.arange(self._start + piece.start, self._start + piece.stop, device=self._decoder.device)
        last = torch.tensor([length - 1], device=positions.device)
        cos, sin = self._decoder.rotary(torch.cat((positions, last)))
        return cos[:-1], sin[:-1]
