"""Decode steps: every layer of the newest token of each sequence, prefetching one layer ahead."""

from __future__ import annotations

import time
from functools import partial

import torch
from torch import Tensor

from ds_offload.decoder import DecoderStack
from ds_offload.kv_context import KVContext
from ds_offload.prefetch.query_predictor import QueryPredictor
from ds_offload.prefetch.selection import Step


class DecodeLoop:
    """Runs decode steps of one context.

    On CUDA every step has the shapes of the longest context that was planned for, so one
    CUDA graph serves them all: the first step runs eagerly (and compiles the kernels),
    the second is captured, and from then on a step is a replay. Lengths, budgets, tokens
    and RoPE go in through fixed buffers; the only thing the host waits for is the
    sampled token. A model whose layers decide on the host what to run (a mixture of
    experts) runs every step eagerly. On a CPU each step is as wide as it needs to be.

    Attributes:
        capture_s: Seconds that capturing the graph took; None without one.
    """

    def __init__(self, decoder: DecoderStack, context: KVContext) -> None:
        self.capture_s: float | None = None
        self._decoder = decoder
        self._context = context
        self._predictor = QueryPredictor(decoder.project_query)
        self._cuda = decoder.device.type == "cuda"
        self._graph: torch.cuda.CUDAGraph | None = None
        self._warm = False
        self._fixed: _StepBuffers | None = None
        self._logits: Tensor | None = None

    def step(self, tokens: list[int], lengths: list[int]) -> Tensor:
        """Logits `[B, vocab]` float32 of each sequence's next token; valid until the next step.

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
        rope = decoder.rotary_each([length - 1 for length in lengths])
        if not self._cuda:
            step = Step.make(lengths, keep, decoder.device)
            return self._layers(torch.tensor(tokens), step, rope)
        if self._fixed is None:
            self._fixed = _StepBuffers(len(tokens), rope, context, decoder.device)
        self._fixed.fill(tokens, lengths, keep, rope)
        if self._graph is not None:
            self._graph.replay()
        elif self._warm and decoder.capturable:
            self._capture()
        else:
            self._logits = self._layers(self._fixed.tokens, self._fixed.step, self._fixed.rope)
            self._warm = True
        assert self._logits is not None
        return self._logits

    def _capture(self) -> None:
        """Capture a step of the buffers' shapes, then run it for the first time."""
        assert self._fixed is not None
        started = time.perf_counter()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph), self._context.streams.capturing():
            self._logits = self._layers(self._fixed.tokens, self._fixed.step, self._fixed.rope)
        self.capture_s = time.perf_counter() - started
        self._graph = graph
        graph.replay()

    def _layers(self, tokens: Tensor, step: Step, rope: tuple[Tensor, Tensor]) -> Tensor:
        decoder, context = self._decoder, self._context
        scheduler = context.scheduler
        scheduler.begin(step)
        hidden = decoder.embed(tokens)
        for layer in range(decoder.layers):
            if layer + 1 < decoder.layers and scheduler.wants_prediction(layer + 1):
                predict = partial(self._predictor.predict, layer, hidden, rope)
                scheduler.start(layer + 1, predict)
            query, key, value = decoder.project_qkv(layer, hidden, rope)
            context.append(layer, key, value, step)
            attention = context.attend(layer, query, step)
            hidden = decoder.finish_layer(layer, hidden, attention.flatten(1))
        return decoder.logits(hidden)


class _StepBuffers:
    """Where a graph finds a step's tokens, lengths, budgets and RoPE.

    Filled on the compute stream in front of the replay that reads them. The pinned
    staging is free again when the host has read the step's logits.
    """

    def __init__(self, sequences: int, rope: tuple[Tensor, Tensor], context: KVContext, device: torch.device) -> None:
        self._staging = torch.zeros(4, sequences, dtype=torch.int64, pin_memory=True)
        self._values = torch.zeros(4, sequences, dtype=torch.int64, device=device)
        self.tokens = self._values[0]
        self.step = Step(self._values[1], self._values[2], self._values[3], context.most_kept, context.longest)
        self.rope = (torch.zeros_like(rope[0]), torch.zeros_like(rope[1]))

    def fill(self, tokens: list[int], lengths: list[int], keep: list[int], rope: tuple[Tensor, Tensor]) -> None:
        self._staging.copy_(torch.tensor([tokens, lengths, [n - 1 for n in lengths], keep]))
        self._values.copy_(self._staging, non_blocking=True)
        for to, of in zip(self.rope, rope, strict=True):
            to.copy_(of)
