"""Prompts answered from sessions that stay read, so that a conversation's next turn reads only what is new in it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ds_offload.document_prompt import common_tokens
from ds_offload.errors import MemoryPlanError
from ds_offload.generation import GenerationOutput
from ds_offload.generator import OffloadedGenerator
from ds_offload.notices import notice, warn
from ds_offload.prefill import ProgressCallback
from ds_offload.session import Session

ProgressMaker = Callable[[], contextlib.AbstractContextManager[ProgressCallback]]


class Cancelled(Exception):
    """Nobody waits for the answer any more."""


@dataclass(frozen=True)
class Answer:
    """What came out, and how many of the prompt's tokens were read before."""

    output: GenerationOutput
    cached_tokens: int


class KeptSessions:
    """The sessions of the last conversations, of which each prompt takes the one that it goes on with.

    An answer is that of a generator that reads the whole prompt: of a session only what its prompts
    were read as is used, never what decoding an answer left.

    Args:
        generator: Stays the caller's to close, behind this.
        keep: Sessions that stay read behind their answer.
        progress: Makes what shows how far the reading of a prompt is.
    """

    def __init__(self, generator: OffloadedGenerator, keep: int, progress: ProgressMaker) -> None:
        self._generator = generator
        self._keep = keep
        self._progress = progress
        # The one that was used last comes last.
        self._sessions: list[Session] = []

    def answer(
        self,
        ids: list[int],
        sampling: dict[str, Any],
        on_piece: Callable[[str], None],
        check: Callable[[], None],
    ) -> Answer:
        """Answer a prompt.

        Args:
            ids: The prompt's token ids, which leave room for an answer.
            sampling: Fields of `SamplingParams`.
            on_piece: Gets each piece of the text as it comes.
            check: Called at every token and while the prompt is read; raises `Cancelled` to end it there.

        Raises:
            InputError: It does not fit the memory that is there.
        """
        begun = time.monotonic()
        with self._progress() as progress:

            def report(phase: str, done: int, total: int) -> None:
                check()
                progress(phase, done, total)

            found = self._take(ids)
            session = found or self._read(ids, report)
            usable = False
            try:
                stream = session.stream_prompt(ids, on_progress=report, **sampling)
                with contextlib.closing(stream):
                    for piece in stream:
                        on_piece(piece)
                        check()
                usable = True
            except Cancelled:
                usable = True
                raise
            finally:
                if usable and self._keep:
                    self._sessions.append(session)
                else:
                    session.close()
        output = session.last_output
        assert output is not None
        cached = len(ids) - output.stats["prefilled_tokens"] if found else 0
        _say(output, cached, time.monotonic() - begun)
        return Answer(output, cached)

    def close(self) -> None:
        """Free every session."""
        while self._sessions:
            self._sessions.pop().close()

    def intact(self) -> bool:
        """Whether the device still works behind an error."""
        device = self._generator.decoder.device
        if device.type != "cuda":
            return True
        try:
            torch.cuda.synchronize(device)
        except RuntimeError:
            return False
        return True

    def _take(self, ids: list[int]) -> Session | None:
        """The session that shares most with `ids`, no longer kept; None where none is worth going on from.

        It is where `ids` go on from all of it, or share half of the longer one. With less in common, going on would
        save little of the reading, and cost the session's own conversation what was read of it.
        """
        found, most = None, 0
        for session in self._sessions:
            shared, read = common_tokens(session.token_ids, ids), len(session.token_ids)
            if shared > most and (shared == read or 2 * shared >= max(len(ids), read)):
                found, most = session, shared
        if found is not None:
            self._sessions.remove(found)
        return found

    def _read(self, ids: list[int], on_progress: ProgressCallback) -> Session:
        """A new session of all but the last token, which the answer begins with."""
        while self._sessions and len(self._sessions) >= self._keep:
            self._sessions.pop(0).close()
        while True:
            try:
                return self._generator.prefill(ids[:-1] or ids, on_progress=on_progress)
            except MemoryPlanError:
                if not self._sessions:
                    raise
            notice("memory is short for another conversation: the one that waited longest is no longer kept")
            self._sessions.pop(0).close()


def _say(output: GenerationOutput, cached: int, seconds: float) -> None:
    notice(
        f"answered: prompt tokens {output.prompt_tokens:,}, of them read before {cached:,}; new tokens "
        f"{len(output.token_ids):,} ({output.finish_reason}) in {seconds:.1f} s"
    )
    monitor = output.stats["monitor"]
    if monitor is not None and monitor["warning"] is not None:
        warn(monitor["warning"])
