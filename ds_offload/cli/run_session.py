"""`ds-offload run --session`: a document is read once, and every question costs its own tokens."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from ds_offload.cli.named_session import NamedSession
from ds_offload.cli.option_groups import ModelOptions
from ds_offload.cli.progress import ProgressReport
from ds_offload.cli.run import build_prompt, check_chat, check_stop, end_text, print_json, print_pieces
from ds_offload.cli.text_source import read_prompt, read_redirected
from ds_offload.config import OffloadConfig
from ds_offload.errors import InputError
from ds_offload.generator import OffloadedGenerator
from ds_offload.given_path import given_path
from ds_offload.notices import notice
from ds_offload.prefill_checkpoint import check_checkpoint_folder
from ds_offload.preparation import PreparedModel, room_of
from ds_offload.prompts import encode_prompt, parse_token_ids
from ds_offload.session import Session


class SessionRun:
    """One question about a named document: it is read and saved where the name is new, and loaded where it is not.

    Raises:
        InputError: A wrong name, or something else in its place.
    """

    def __init__(
        self,
        model: ModelOptions,
        config: OffloadConfig,
        name: str,
        sessions_dir: str | None,
        question: str,
        chat: bool = False,
    ) -> None:
        self._named = NamedSession(name, sessions_dir)
        self._question = question
        self._chat = chat
        self._model = model
        self._config = config

    def run(
        self,
        prompt: str | None,
        prompt_file: str | None,
        sampling: dict[str, Any],
        as_json: bool,
        checkpoint: str | None,
    ) -> None:
        """Answer and print; the document is the prompt, which a session that is there needs no more.

        Raises:
            InputError: No document for a new session, another than a session's, a session of another model, or
                a question, a stop or a checkpoint that would fail behind the reading of the document.
            SessionWriteError: The session could not be saved; the answer was printed.
        """
        real = Path(os.path.realpath(self._named.folder))
        if checkpoint is not None and given_path(checkpoint, "checkpoint").resolve().is_relative_to(real):
            raise InputError(
                f"--checkpoint {checkpoint} is in the folder of the session {self._named.folder}, which takes nothing "
                "else; give --checkpoint another folder"
            )
        text = self._text(prompt, prompt_file)
        prepared = PreparedModel.find(**dataclasses.asdict(self._model), config=self._config)
        question: str | list[int] = self._question
        if prepared.tokenizer is None:
            question = encode_prompt(parse_token_ids(self._question), None, prepared.source.shape.vocab_size)
        check_stop(sampling, prepared.tokenizer)
        check_chat(self._chat, prepared.tokenizer)
        document = self._document(text, prepared)
        if checkpoint is not None:
            if document is None:
                notice(f"the session {self._named.folder} is read already: --checkpoint is not used")
            else:
                check_checkpoint_folder(given_path(checkpoint, "checkpoint"))
        with OffloadedGenerator.from_prepared(prepared) as generator:
            session, unsaved = self._named.open(generator, document, checkpoint)
            with session:
                _answer(generator, session, question, sampling, as_json)
        if unsaved is not None:
            raise unsaved

    def _text(self, prompt: str | None, prompt_file: str | None) -> str | None:
        """The document's text; None where none was given and the session is there."""
        if prompt is not None or prompt_file is not None:
            return read_prompt(prompt, prompt_file)
        if self._named.header is not None:
            return read_redirected()
        try:
            return read_prompt(None, None)
        except InputError as error:
            raise InputError(f"there is no session {self._named.folder} yet, and {error}") from None

    def _document(self, text: str | None, prepared: PreparedModel) -> str | list[int] | None:
        """The document to read; None where the session is there, and of that document."""
        if text is None:
            return None
        document = text if prepared.tokenizer is not None else parse_token_ids(text)
        if self._named.header is None:
            ids = prepared.encode(document if isinstance(document, list) else self._first_prompt(text, prepared))
            prepared.check([len(ids)], [room_of(prepared.config)])
            return document
        self._named.check_document(document)
        return None

    def _first_prompt(self, text: str, prepared: PreparedModel) -> Any:
        return build_prompt(text, self._question, False, prepared.tokenizer)


def _answer(
    generator: OffloadedGenerator, session: Session, question: str | list[int], sampling: dict[str, Any], as_json: bool
) -> None:
    if as_json:
        with ProgressReport() as progress:
            output = session.ask(question, keep=False, on_progress=progress, **sampling)
        print_json(generator, output)
        return
    with ProgressReport(phases=("prefill",)) as progress:
        print_pieces(session.stream(question, keep=False, on_progress=progress, **sampling), progress)
    assert session.last_output is not None
    end_text(session.last_output)
