"""`ds-offload chat`: a conversation in the terminal, over a document or without one."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ds_offload.cli.config_options import config_options
from ds_offload.cli.option_groups import ModelOptions, SessionsDirOption, model_options, sampling_options
from ds_offload.cli.run import build_prompt, check_sampling
from ds_offload.cli.text_source import STDIN, read_text_file
from ds_offload.cli.typed_lines import TypedLines
from ds_offload.config import OffloadConfig
from ds_offload.errors import InputError

if TYPE_CHECKING:
    from ds_offload.cli.named_session import NamedSession
    from ds_offload.generator import OffloadedGenerator
    from ds_offload.preparation import PreparedModel
    from ds_offload.session import Session


@config_options
@sampling_options
@model_options
def chat(
    model: ModelOptions,
    sampling: dict[str, Any],
    config: OffloadConfig,
    prompt_file: Annotated[
        str | None,
        typer.Option("--prompt-file", "-f", metavar="FILE", help="A text file with the document to talk about."),
    ] = None,
    session: Annotated[
        str | None,
        typer.Option(
            "--session",
            metavar="NAME",
            help="Go on with the session of this name or path; with --prompt-file it is made where it is new.",
        ),
    ] = None,
    sessions_dir: SessionsDirOption = None,
    system: Annotated[
        str | None,
        typer.Option("--system", metavar="TEXT", help="A system message for a conversation without a document."),
    ] = None,
) -> None:
    """Talk to a model, about a document or not: a line, a question. /help lists what else can be typed."""
    check_sampling(sampling)
    if prompt_file == STDIN:
        raise InputError("--prompt-file - is standard input, where the questions come from; give the path of a file")
    if system is not None and (prompt_file is not None or session is not None):
        raise InputError("--system goes without --prompt-file and --session; leave one of them out")
    lines = TypedLines()
    text = read_text_file(prompt_file) if prompt_file is not None else None
    from ds_offload.cli.conversation_loop import ConversationLoop
    from ds_offload.cli.named_session import NamedSession
    from ds_offload.generator import OffloadedGenerator
    from ds_offload.preparation import PreparedModel

    named = NamedSession(session, sessions_dir) if session is not None else None
    if named is not None and named.header is None and text is None:
        raise InputError(
            f"there is no session {named.folder} yet; give --prompt-file FILE to make one of a document, or begin "
            "without --session and /save the conversation"
        )
    prepared = PreparedModel.find(**dataclasses.asdict(model), config=config)
    document = _check(prepared, text, named, system)
    with OffloadedGenerator.from_prepared(prepared) as generator:
        opened, unsaved = _open(generator, document, named, system)
        with opened:
            loop = ConversationLoop(generator, opened, lines, sampling, named, sessions_dir)
            if unsaved is not None:
                loop.refuse(unsaved)
            loop.run()
    if loop.refused and not lines.interactive:
        # A script is to know that something it asked for was not done, and has read what.
        raise typer.Exit(2)


def _check(prepared: PreparedModel, text: str | None, named: NamedSession | None, system: str | None) -> str | None:
    """Refuse what would fail once the weights are loaded; the document to read, None where there is none to be read.

    Raises:
        InputError: No tokenizer or chat template where one is needed, another document than the session's, a session of
            token ids, or no room.
    """
    from ds_offload.document_prompt import DocumentPrompt
    from ds_offload.preparation import check_room, room_of

    if prepared.tokenizer is None:
        raise InputError("chat needs a tokenizer, and this model's folder has none; put tokenizer.json into the folder")
    room = room_of(prepared.config)
    header = named.header if named is not None else None
    if named is not None and header is not None:
        if header.document is None:
            raise InputError(
                f"the session {named.folder} is of token ids, with no place for a text; ask it with `ds-offload run`"
            )
        if text is not None:
            named.check_document(text)
        check_room(header.token_ids, prepared.config, "session")
        prepared.check([1], [room])
        return None
    if text is None:
        ids = DocumentPrompt.opening(prepared.tokenizer, system)[1]
        check_room(ids, prepared.config, "conversation")
    else:
        ids = prepared.encode(build_prompt(text, "?", False, prepared.tokenizer))
    prepared.check([len(ids)], [room])
    return text


def _open(
    generator: OffloadedGenerator, document: str | None, named: NamedSession | None, system: str | None
) -> tuple[Session, Exception | None]:
    """The session to go on with, and why it could not be saved where it was to be."""
    from ds_offload.cli.progress import ProgressReport

    if named is not None:
        return named.open(generator, document)
    if document is None:
        return generator.converse(system), None
    with ProgressReport(phases=("prefill",)) as progress:
        return generator.prefill(document, on_progress=progress), None
