"""How far a prefill is, and how far the host may run ahead of the device."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import torch

from ds_offload.decoder import DecoderStack

ProgressCallback = Callable[[str, int, int], None]

# Floating-point operations that the device is given ahead of what it has done: enough that it never
# waits for the host, and so little that an interrupted prefill ends soon on a slow device too.
AHEAD_FLOPS = 2e13
# Between two reports within a layer.
REPORT_EVERY_S = 0.2
_POLL_S = 0.0005


class Pace:
    """Work of one prefill in floating-point operations: done, in flight, all.

    The host hands in a part of the work after it has issued it. Where too much is in
    flight it waits here, in Python and a little at a time, so that Ctrl-C is answered.

    Args:
        tokens: Tokens to prefill.
        start: Tokens before them.
        layers_done: Layers that an earlier run has finished.
        on_progress: Called with ("prefill", tokens done, tokens), work counted as that share of the tokens.
    """

    def __init__(
        self,
        decoder: DecoderStack,
        tokens: int,
        start: int = 0,
        layers_done: int = 0,
        on_progress: ProgressCallback | None = None,
    ) -> None:
        self._tokens = tokens
        self._on_progress = on_progress
        self._device = decoder.device
        self._per_token = 2.0 * layer_parameters(decoder)
        self._per_pair = 4.0 * decoder.head_dim
        pairs = decoder.heads * tokens * (start + tokens / 2)
        layer = tokens * self._per_token + pairs * self._per_pair
        self._total = layer * decoder.layers
        self._done = layer * layers_done
        self._in_flight: deque[tuple[torch.cuda.Event, float]] = deque()
        self._ahead = 0.0
        self._said = (-1, 0.0)
        self._report(self._done_tokens(), time.monotonic())

    def projected(self, tokens: int) -> None:
        """Norms, projections and MLP of `tokens` tokens of one layer were issued."""
        self._issued(tokens * self._per_token)

    def attended(self, pairs: float) -> None:
        """Attention of so many pairs of tokens, times query heads, was issued."""
        self._issued(pairs * self._per_pair)

    def drain(self) -> None:
        """Wait until the device has done all of it, so that what it wrote may be read."""
        while self._in_flight:
            self._await_oldest()

    def finish_layer(self) -> None:
        """Every layer is reported, however short: what of it the device has done."""
        while self._in_flight and self._in_flight[0][0].query():
            self._await_oldest()
        self._report(self._done_tokens(), time.monotonic())

    def finish(self) -> None:
        """All is done, and said so."""
        self.drain()
        self._report(self._tokens, time.monotonic())

    def _issued(self, work: float) -> None:
        if self._device.type != "cuda":
            self._done += work
        else:
            event = torch.cuda.Event()
            event.record()
            self._in_flight.append((event, work))
            self._ahead += work
            # The last part stays in flight, so that the device has work while the host issues more.
            while len(self._in_flight) > 1 and self._ahead > AHEAD_FLOPS:
                self._await_oldest()
        now = time.monotonic()
        if now - self._said[1] >= REPORT_EVERY_S:
            self._report(self._done_tokens(), now)

    def _await_oldest(self) -> None:
        event, work = self._in_flight[0]
        while not event.query():
            time.sleep(_POLL_S)
        self._in_flight.popleft()
        self._ahead -= work
        self._done += work

    def _done_tokens(self) -> int:
        # Parts are added up in another order than the total: they may miss it by a rounding.
        return min(self._tokens, int(self._tokens * self._done / self._total + 1e-6))

    def _report(self, tokens: int, now: float) -> None:
        if self._on_progress is not None and tokens != self._said[0]:
            self._on_progress("prefill", tokens, self._tokens)
        self._said = tokens, now


def layer_parameters(decoder: DecoderStack) -> int:
    """Parameters of a layer that a token goes through, the MLP counted as one, be it a mixture of experts or not."""
    block = decoder.blocks[0]
    attention = sum(parameter.numel() for parameter in block.self_attn.parameters())
    return attention + 3 * decoder.hidden_size * decoder.intermediate_size
