"""A document that stays read: asked, forked and saved."""

from __future__ import annotations

import contextlib
import copy
import datetime
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ds_offload.calibration import Calibration
from ds_offload.config import OffloadConfig
from ds_offload.conversation import Conversation
from ds_offload.document_prompt import DocumentPrompt, conversation_ids
from ds_offload.errors import InputError
from ds_offload.generation import GenerationOutput, Sequence
from ds_offload.given_path import given_path
from ds_offload.kv_context import KVContext
from ds_offload.memory.plan import MemoryPlan
from ds_offload.memory_check import check_request
from ds_offload.notices import warn
from ds_offload.prefill import ProgressCallback
from ds_offload.preparation import check_room, room_of
from ds_offload.prompts import encode_prompt
from ds_offload.sampling import SamplingParams
from ds_offload.session_file import write_session
from ds_offload.session_header import SessionHeader, SessionIdentity, calibration_digest

if TYPE_CHECKING:
    from ds_offload.generator import OffloadedGenerator


class Session:
    """K/V of a document and of what was asked about it; made by `OffloadedGenerator`.

    Its `prefill` reads a document, its `converse` begins without one, and its `load_session` goes on with a saved one.

    A question costs its own tokens only. It joins the session with its answer, or is
    forgotten behind it (`keep=False`). Use a session as a context manager, or call `close`
    when done, before its generator is closed. One call runs at a time.

    Attributes:
        document_tokens: Of `token_ids`, those of the document, or of what stands before a conversation's first message.
        last_output: What the last `ask` or `stream` gave, once it has ended.
    """

    def __init__(
        self,
        generator: OffloadedGenerator,
        context: KVContext,
        plan: MemoryPlan,
        calibration: Calibration,
        document: DocumentPrompt | None,
        token_ids: list[int],
        document_tokens: int,
        stored: int,
    ) -> None:
        """Own `context`, which holds the first `stored` tokens. Users call methods of `OffloadedGenerator`."""
        self.document_tokens = document_tokens
        self.document = document
        self.last_output: GenerationOutput | None = None
        self.config: OffloadConfig = generator.config
        self._generator = generator
        self._calibration = calibration
        self._conversation = Conversation(generator, generator.config, context, plan, token_ids, stored)

    @property
    def token_ids(self) -> list[int]:
        """Document, questions and answers so far."""
        return self._conversation.token_ids

    @property
    def stored(self) -> int:
        """Tokens whose K/V are there; those behind them are read with the next question."""
        return self._conversation.stored

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Free everything on host and device that no fork shares."""
        self._conversation.close()

    def ask(
        self,
        question: str | list[int],
        *,
        keep: bool = True,
        output_logits: bool = False,
        on_progress: ProgressCallback | None = None,
        **sampling: Any,
    ) -> GenerationOutput:
        """Answer a question about the document, or go on with the conversation.

        Args:
            question: A text, put behind the document or the last answer as the chat template
                wants it (behind a document of token ids as it is); or token ids, appended as they are.
            keep: Whether question and answer join the session; else it is as before.
            output_logits, on_progress, **sampling: As in `OffloadedGenerator.generate`.

        Returns:
            The answer; `prompt_tokens` counts the whole context, and `stats["prefilled_tokens"]`
            those of them that were new.

        Raises:
            InputError: An empty question or one of another kind, no room for it, a wrong sampling value, or a session
                that is closed or still answering.
        """
        sequence = self._sequence(question, sampling)
        for _ in self._answer(self.token_ids, sequence, keep, output_logits, on_progress):
            pass
        assert self.last_output is not None
        monitored = self.last_output.stats["monitor"]
        if monitored is not None and monitored["warning"] is not None:
            warn(monitored["warning"])
        return self.last_output

    def stream(
        self,
        question: str | list[int],
        *,
        keep: bool = True,
        on_progress: ProgressCallback | None = None,
        **sampling: Any,
    ) -> Generator[str, None, None]:
        """`ask` piece by piece; `last_output` holds the whole when the iterator ends.

        Closing the iterator early keeps what was said so far, or nothing with `keep=False`.

        Raises:
            InputError: As `ask`, at the call.
        """
        return self._answer(self.token_ids, self._sequence(question, sampling), keep, False, on_progress)

    def undo(self) -> None:
        """Forget the last question that was kept, and its answer; again, the one before.

        Raises:
            InputError: None was kept since the document was read or the session loaded, or the session is closed or
                still answering.
        """
        self._check_free()
        if not self._conversation.undo():
            raise InputError("there is nothing to undo: no question was kept since the session began or was loaded")
        self.last_output = None

    def stream_prompt(
        self, token_ids: list[int], *, on_progress: ProgressCallback | None = None, **sampling: Any
    ) -> Generator[str, None, None]:
        """Answer a whole prompt piece by piece; what it and the session both begin with is not read again.

        The session is one of that prompt from then on, without its answer: what was said is forgotten, so that a
        later prompt with that answer in it reads it as `generate` would. Closing the iterator early does the same.

        Args:
            token_ids: The whole prompt.
            on_progress, **sampling: As in `OffloadedGenerator.generate`.

        Raises:
            InputError: As `ask`, at the call.
        """
        self._check_free()
        vocabulary = self._generator.loaded.source.shape.vocab_size
        ids = encode_prompt(token_ids, None, vocabulary)
        return self._answer_prompt(self.token_ids, self._room_for(ids, sampling), on_progress)

    def _answer_prompt(
        self, before: list[int], sequence: Sequence, on_progress: ProgressCallback | None
    ) -> Generator[str, None, None]:
        self._check_same(before)
        context = self._conversation.context
        budget = context.budget_state
        try:
            yield from self._answer(before, sequence, True, False, on_progress)
        finally:
            # What a monitor raised for this answer is not the next one's.
            context.budget_state = budget
            if self.token_ids is not before and not self._conversation.closed:
                # The prompt was read.
                self._conversation.take_back(len(sequence.prompt))
                self.document, self.document_tokens = None, len(sequence.prompt)

    @torch.no_grad()
    def fork(self) -> Session:
        """Another session that begins as this one and goes its own way.

        Whole segments of the host store are shared until one of the two writes to them; the
        rest is copied. Each may be closed first.

        Raises:
            InputError: The copy does not fit, or the session is closed or still answering.
        """
        self._check_free()
        conversation = self._conversation
        conversation.read_window(self.token_ids)
        store = conversation.context.store
        shared = store.shared_bytes(self.stored) if self.config.kv_location == "host" else 0
        loaded, room = self._generator.loaded, room_of(self.config)
        # A fork takes what is free: blocks of earlier calls are not counted, and must not stand in its way.
        self._generator.kept.release()
        plan = check_request(loaded, self.config, [1], [room], continued=True, shared=shared)
        context = KVContext(self._generator.decoder, self.config, self._calibration, [room], self._generator.faults)
        fork = copy.copy(self)
        with contextlib.ExitStack() as undo:
            undo.callback(context.close)
            fork._conversation = conversation.fork(context, plan)
            undo.pop_all()
        return fork

    @torch.no_grad()
    def save(self, path: str | Path) -> SessionHeader:
        """Write the session to the folder `path`, in the place of a session that is there: whole, or not at all.

        Raises:
            InputError: `path` is no path, something else is there, the disk has no room, or the session is closed
                or answering.
            SessionWriteError: It could not be written; what was there is intact.
        """
        self._check_free()
        folder = given_path(path, "path").absolute()
        self._conversation.read_window(self.token_ids)
        loaded = self._generator.loaded
        identity = SessionIdentity.of(loaded, self.config)
        header = SessionHeader(
            identity=identity,
            calibration=calibration_digest(self._calibration, identity.quantised),
            model_name=loaded.source.name,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            token_ids=self.token_ids,
            stored=self.stored,
            document_tokens=self.document_tokens,
            document=self.document,
        )
        return write_session(folder, header, self._conversation.context, self._calibration)

    def _sequence(self, question: str | list[int], sampling: dict[str, Any]) -> Sequence:
        self._check_free()
        before = self.token_ids, self.document, self.document_tokens
        return self._room_for(conversation_ids(*before, question, self._generator.loaded), sampling)

    def _room_for(self, ids: list[int], sampling: dict[str, Any]) -> Sequence:
        params = SamplingParams(**sampling)
        check_room(ids, self.config, "conversation")
        assert isinstance(params.max_new_tokens, int)
        limit = min(params.max_new_tokens, room_of(self.config) - len(ids))
        return Sequence(ids, limit, params, self._generator.loaded)

    def _answer(
        self,
        before: list[int],
        sequence: Sequence,
        keep: bool,
        keep_logits: bool,
        on_progress: ProgressCallback | None,
    ) -> Generator[str, None, None]:
        self._check_same(before)
        stats = yield from self._conversation.answer(sequence, keep, keep_logits, on_progress)
        self.last_output = sequence.output(stats)

    def _check_same(self, before: list[int]) -> None:
        self._check_free()
        if self.token_ids is not before:
            raise InputError("the session went on since this stream was made; ask for another one")

    def _check_free(self) -> None:
        if self._conversation.closed:
            raise InputError("the session is closed; read the document again, or load a saved session")
        if self._conversation.answering:
            raise InputError("the session is still answering; take the whole stream, or close it first")
        self._generator.check_open()
