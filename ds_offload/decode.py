"""Decode steps: every layer of the newest token of each sequence, prefetching one layer ahead."""

from __future__ import annotations

import time
from functools import partial

import torch
from torch import Tensor

from ds_offload.decode_layers import DecodeLayers
from ds_offload.decoder import DecoderStack, Rope
from ds_offload.kernels.new_token import rotate_heads
from ds_offload.kernels.select import score_width
from ds_offload.kv_context import KVContext
from ds_offload.prefetch.selection import Step, step_values
from ds_offload.prefetch.streams import capture_stream
from ds_offload.step_wait import StepWait

# One layer in so many is in the first of a step's two graphs.
FIRST_GRAPH = 8


class DecodeLoop:
    """Runs decode steps of one context.

    On CUDA every step has the shapes of the longest context that was planned for, so one
    CUDA graph, in two parts, serves them all: the first step runs eagerly (and compiles
    the kernels), the second is captured, and from then on a step is a replay. Lengths,
    budgets, tokens and RoPE go in through fixed buffers; the only thing the host waits
    for is the sampled token. A model whose layers decide on the host what to run (a mixture of
    experts) runs every step eagerly, and so does one whose store is staged. On a CPU each
    step is as wide as it needs to be.

    Attributes:
        capture_s: Seconds that capturing the graph took; None without one.
        last: The last step; valid until the next one.
    """

    def __init__(self, decoder: DecoderStack, context: KVContext) -> None:
        self.capture_s: float | None = None
        self.last: Step | None = None
        self._decoder = decoder
        self._context = context
        self._cuda = decoder.device.type == "cuda"
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self._warm = False
        self._fixed: _StepBuffers | None = None
        self._parts: DecodeLayers | None = None
        self._logits: Tensor | None = None
        self._wait = StepWait(torch.cuda.Event(blocking=True)) if self._cuda else None

    def step(self, tokens: list[int], lengths: list[int]) -> Tensor:
        """Logits `[B, vocab]` float32 of each sequence's next token, ready to read; valid until the next step.

        Args:
            tokens: The newest token of each of the B sequences; its K/V join the context.
            lengths: Tokens of each context, the newest included.
        """
        context, decoder = self._context, self._decoder
        for sequence, length in enumerate(lengths):
            context.reserve(sequence, length)
        # The last step's writer reads what this one fills again, and its rows and labels are read from here on.
        context.streams.join()
        keep = context.keep(lengths)
        if self._parts is None:
            self._parts = DecodeLayers(decoder, len(tokens))
        if not self._cuda:
            step = Step.make(lengths, keep, context.window, decoder.device)
            return self._layers(torch.tensor(tokens), step, decoder.rotary_each([length - 1 for length in lengths]))
        if self._fixed is None:
            self._fixed = _StepBuffers(len(tokens), context, decoder)
        self._fixed.fill(tokens, lengths, keep)
        if context.store.staged:
            # Rows come by way of the host from now on, also where only the newest segment is not page-locked.
            self._graphs = []
        started = None
        if self._graphs:
            started = time.perf_counter()
            for graph in self._graphs:
                graph.replay()
        elif self._warm and decoder.capturable and not context.store.staged:
            self._capture()
        else:
            self._logits = self._layers(self._fixed.tokens, self._fixed.step, self._fixed.rope)
            self._warm = True
        assert self._logits is not None and self._wait is not None
        self._wait.wait(started)
        return self._logits

    def _capture(self) -> None:
        """Capture a step of the buffers' shapes, then run it for the first time.

        Launching a graph of many hundred kernels takes the host a millisecond. The first of two graphs has few layers,
        and the other is launched while those compute.
        """
        assert self._fixed is not None
        fixed, layers = self._fixed, self._decoder.layers
        started = time.perf_counter()
        graphs: list[torch.cuda.CUDAGraph] = []
        hidden: Tensor | None = None
        cut = -(-layers // FIRST_GRAPH)
        for part in filter(None, (range(cut), range(cut, layers))):
            graph = torch.cuda.CUDAGraph()
            pool = graphs[0].pool() if graphs else None
            with (
                torch.cuda.graph(graph, pool=pool, stream=capture_stream(self._decoder.device)),
                self._context.streams.capturing(),
            ):
                # In front of the hand-over `hidden`: predictions read it.
                rope = self._turn(fixed.step, fixed.rope)
                if hidden is None:
                    hidden = self._begin(fixed.tokens, fixed.step)
                else:
                    # The other graph's hand-overs end with it; the prefetch stream forks from this one.
                    with self._context.streams.producing("hidden", part.start):
                        pass
                hidden = self._run(part, hidden, fixed.step, rope)
                if part.stop == layers:
                    assert self._parts is not None
                    self._logits = self._parts.logits(hidden)
            graphs.append(graph)
        self.capture_s = time.perf_counter() - started
        self._graphs = graphs
        for graph in graphs:
            graph.replay()

    def _layers(self, tokens: Tensor, step: Step, rope: Rope | None) -> Tensor:
        """All layers of one step; without `rope` it is computed from the step's positions."""
        assert self._parts is not None
        turn = self._turn(step, rope)
        hidden = self._begin(tokens, step)
        return self._parts.logits(self._run(range(self._decoder.layers), hidden, step, turn))

    def _turn(self, step: Step, rope: Rope | None) -> Rope:
        return rope if rope is not None else self._decoder.rotary(step.positions)

    def _begin(self, tokens: Tensor, step: Step) -> Tensor:
        """What comes before a step's layers; the first one's input `[B, hidden]`."""
        context = self._context
        self.last = step
        context.attended.clear()
        context.scheduler.begin(step)
        with context.streams.producing("hidden", 0):
            return self._decoder.embed(tokens)

    def _run(self, layers: range, hidden: Tensor, step: Step, rope: Rope) -> Tensor:
        """Some layers of one step: from the first one's input `[B, hidden]` to the last one's output."""
        decoder, context, parts = self._decoder, self._context, self._parts
        assert parts is not None
        scheduler, streams = context.scheduler, context.streams
        for layer in layers:
            if layer + 1 < decoder.layers and scheduler.wants_prediction(layer + 1):
                scheduler.start(layer + 1, hidden, partial(self._predict, layer + 1, rope))
            query = context.take(layer, parts.project(layer, hidden), rope, parts.head_norms(layer), step)
            attention = context.attend(layer, query, step)
            with streams.producing("hidden", layer + 1):
                hidden = parts.finish(layer, hidden, attention.flatten(1))
        return hidden

    def _predict(self, layer: int, rope: Rope, hidden: Tensor) -> Tensor:
        """The query `[B, H, D]` that `layer` will have, from the input `[B, hidden]` of the layer before.

        The residual stream changes little within a layer, so the layer's own norm, Wq and
        RoPE applied to it give nearly the same query (Double Sparsity, arXiv 2408.07092,
        section 3.3, with the next layer's norm in place of this one's).
        """
        assert self._parts is not None
        norms = self._parts.head_norms(layer)
        query = self._parts.project_query(layer, hidden)
        return rotate_heads(query, rope, norms.query, norms.eps) if norms is not None else rotate_heads(query, rope)


class _StepBuffers:
    """Where a graph finds a step's tokens, lengths and budgets, and RoPE where the step does not compute it.

    Filled on the compute stream in front of the replay that reads them. The staging,
    pinned unless the driver has refused to pin the store, is free again when the host has read the step's logits.
    """

    def __init__(self, sequences: int, context: KVContext, decoder: DecoderStack) -> None:
        self._decoder = decoder
        self._window = context.window
        self._staging = torch.zeros(6, sequences, dtype=torch.int64, pin_memory=not context.store.staged)
        self._values = torch.zeros(6, sequences, dtype=torch.int64, device=decoder.device)
        self.tokens = self._values[0]
        lengths, positions, past, keep, keep_ahead = self._values[1:]
        self.step = Step(lengths, positions, past, keep, keep_ahead, context.most_kept, score_width(context.longest))
        self.rope: Rope | None = None
        if not decoder.length_free_rope:
            cos, sin = decoder.rotary_each([0] * sequences)
            self.rope = torch.empty_like(cos), torch.empty_like(sin)

    def fill(self, tokens: list[int], lengths: list[int], keep: list[int]) -> None:
        values = step_values(lengths, keep, self._window)
        self._staging.copy_(torch.tensor([tokens, *values]))
        self._values.copy_(self._staging, non_blocking=True)
        if self.rope is not None:
            for to, of in zip(self.rope, self._decoder.rotary_each(values[1]), strict=True):
                to.copy_(of)
