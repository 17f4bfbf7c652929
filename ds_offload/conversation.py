"""A conversation's tokens and their K/V: read on turn by turn, decoded from, and taken back."""

from __future__ import annotations

import weakref
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ds_offload.config import OffloadConfig
from ds_offload.context_copy import copy_context, copy_window, own_from, rewind
from ds_offload.decode import DecodeLoop
from ds_offload.document_prompt import common_tokens
from ds_offload.errors import InputError
from ds_offload.generation import Sequence
from ds_offload.kv_context import KVContext
from ds_offload.memory.plan import MemoryPlan
from ds_offload.memory.workspace import piece_tokens
from ds_offload.monitor import FidelityMonitor
from ds_offload.prefill import ProgressCallback, prefill
from ds_offload.preparation import room_of
from ds_offload.statistics import RunStatistics

if TYPE_CHECKING:
    from ds_offload.generator import OffloadedGenerator


@dataclass(frozen=True)
class Turn:
    """What it takes to go back to before a turn that joined the conversation.

    Attributes:
        common: Tokens from the beginning on that the turn left as they were.
        rest: Those behind them that it replaced: the last ones of a document, if any.
        stored: Tokens whose K/V it left as they were.
        budget: The context's budget state of that time.
    """

    common: int
    rest: list[int]
    stored: int
    budget: Any


class Conversation:
    """What was said so far, over a context of one sequence that it owns.

    Attributes:
        token_ids: Document, questions and answers so far.
        stored: Tokens whose K/V are there; those behind them are read with the next turn.
        context: Their K/V, freed with the conversation if not by `close`.
        answering: Whether a turn has begun and not ended.
    """

    def __init__(
        self,
        generator: OffloadedGenerator,
        config: OffloadConfig,
        context: KVContext,
        plan: MemoryPlan,
        token_ids: list[int],
        stored: int,
    ) -> None:
        """Own `context`, which holds the first `stored` tokens."""
        self.token_ids = token_ids
        self.stored = stored
        self.context = context
        self.answering = False
        self._generator = generator
        self._config = config
        self._plan = plan
        # Those that can be taken back, the newest last.
        self._turns: list[Turn] = []
        # Its CUDA graph serves every answer from this context.
        self._loop: DecodeLoop | None = None
        # Whether something has begun and not ended that an error or Ctrl-C leaves half done: slots count as filled
        # before they are, tokens as stored before they are said.
        self._unsettled = False
        # Whether sinks and recent tokens are on the device as they are, which only quantised rows may make untrue.
        self._windowed = True
        self._finalizer = weakref.finalize(self, context.close)

    @property
    def closed(self) -> bool:
        """Whether the context was freed."""
        return not self._finalizer.alive

    def close(self) -> None:
        """Free everything on host and device that no fork shares."""
        self._loop = None
        self._finalizer()

    def fork(self, context: KVContext, plan: MemoryPlan) -> Conversation:
        """The same conversation over `context`, which is new and of the same shape, and which it owns."""
        copy_context(context, self.context, self.stored)
        other = Conversation(self._generator, self._config, context, plan, self.token_ids, self.stored)
        other._turns = list(self._turns)
        return other

    @torch.no_grad()
    def answer(
        self, sequence: Sequence, keep: bool, keep_logits: bool, on_progress: ProgressCallback | None
    ) -> Generator[str, None, dict[str, Any]]:
        """Take a turn: read what is new in `sequence`, and decode its answer piece by piece.

        With `keep` what was said joins the conversation, also where the turn is closed early; else it is forgotten.

        Returns:
            Statistics of the turn.
        """
        before, ids = self.token_ids, sequence.prompt
        statistics = RunStatistics(self._generator.decoder, self._config)
        statistics.begin(self._plan)
        # A question may begin with characters that make other tokens of the document's last ones.
        common = common_tokens(before, ids)
        start = min(self.stored, common, len(ids) - 1)
        if start < self.stored:
            self.forget(start)
        self.read_window(ids)
        window, budget = copy_window(self.context), self.context.budget_state
        prefilled = settled = False
        self.answering = self._unsettled = True
        try:
            own_from(self.context, start)
            logits = self._extend(ids, start, on_progress)
            prefilled = True
            self.stored = len(ids)
            yield sequence.take(logits, keep_logits)
            statistics.prefilled()
            yield from self._decode(sequence, statistics, keep_logits, on_progress)
            settled = True
        except GeneratorExit:
            # Between two steps.
            settled = True
            raise
        finally:
            self.answering = False
            if prefilled and keep:
                self._turns.append(Turn(common, before[common:], start, budget))
                self.token_ids = ids + sequence.tokens
                self._unsettled = not settled
            elif not self.closed:
                self.context.budget_state = budget
                self.forget(start, window)
        return statistics.summary() | {"prefilled_tokens": len(ids) - start}

    @torch.no_grad()
    def undo(self) -> bool:
        """Go back to before the last turn; False where none was taken since the conversation was made.

        Whatever interrupts it leaves the conversation as it was, or as it is behind it.
        """
        if not self._turns:
            return False
        turn = self._turns[-1]
        if self._unsettled:
            self._loop = None
        self.context.budget_state = turn.budget
        self.forget(turn.stored)
        self.token_ids = self.token_ids[: turn.common] + turn.rest
        self._turns.pop()
        return True

    def read_window(self, ids: list[int]) -> None:
        """Read the recent ones of the stored tokens again where the window has lost them; `ids` begin with those.

        What a turn that did not end as it should has left is forgotten first.
        Where the context was taken back to begins before its newest tokens, quantised rows are all there is of them.
        """
        if self._unsettled:
            self._loop = None
            self.forget(min(self.stored, len(self.token_ids)))
        if self._windowed:
            return
        tokens = self.stored
        # They are being written from here on, whatever ends this.
        self.stored = max(0, tokens - self.context.window.ring)
        own_from(self.context, self.stored)
        self._extend(ids[:tokens], self.stored, None)
        self.stored, self._windowed = tokens, True

    def forget(self, tokens: int, window: dict[int, Tensor] | None = None) -> None:
        """Let go of the K/V of all tokens from number `tokens` on; `window` is a copy of that time."""
        self._unsettled = True
        self.stored = tokens
        self._windowed = rewind(self.context, tokens, window)
        self._unsettled = False

    def take_back(self, tokens: int) -> None:
        """Unsay what is behind the first `tokens` tokens, for good: nothing before them can be undone any more.

        Behind a turn that broke off, the next one lets go of it.
        """
        self.token_ids = self.token_ids[:tokens]
        self._turns.clear()
        if self.stored > tokens and not self._unsettled:
            self.forget(tokens)

    def _check_open(self) -> None:
        """Whoever takes a stream may close what it comes from between two pieces."""
        if self.closed:
            raise InputError("the session is closed; read the document again")
        self._generator.check_open()

    def _extend(self, ids: list[int], start: int, on_progress: ProgressCallback | None) -> Tensor:
        """Read the tokens from `start` on; logits of the last."""
        context, new = self.context, ids[start:]
        context.scheduler.clear_traffic()
        # The answer's first tokens have their place before decoding begins, as in `generate`.
        room = min(room_of(self._config), len(ids) + int(self._config.segment_tokens))
        context.prepare(0, room)
        decoder = self._generator.decoder
        streamed = len(new) > piece_tokens(decoder.heads, decoder.head_dim)
        logits = prefill(decoder, context, 0, new, on_progress, start=start, streamed=streamed)
        context.reserve(0, room)
        return logits

    def _decode(
        self,
        sequence: Sequence,
        statistics: RunStatistics,
        keep_logits: bool,
        on_progress: ProgressCallback | None,
    ) -> Iterator[str]:
        self._check_open()
        context, captured = self.context, self._loop is not None and self._loop.capture_s is not None
        decoder = self._generator.decoder
        if self._loop is None:
            self._loop = DecodeLoop(decoder, context)
        monitor = FidelityMonitor(decoder, self._config, budget=context.token_budget)
        while sequence.finish_reason is None:
            logits = self._loop.step([sequence.tokens[-1]], [sequence.length])
            self.stored = sequence.length
            piece = sequence.take(logits[0], keep_logits)
            statistics.stepped(context, [self.stored], monitor.seconds)
            monitor.stepped(context, self._loop, [self.stored], [0])
            if on_progress is not None:
                on_progress("decode", len(sequence.tokens), sequence.limit)
            yield piece
            self._check_open()
        statistics.finish(context, None if captured else self._loop.capture_s, monitor)
