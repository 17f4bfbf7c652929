"""`ds-offload run`: one prompt, one answer."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ds_offload.cli.config_options import config_options
from ds_offload.cli.figures import figures_line, monitor_line
from ds_offload.cli.option_groups import (
    CheckpointOption,
    ModelOptions,
    SessionsDirOption,
    model_options,
    sampling_options,
)
from ds_offload.cli.progress import ProgressReport
from ds_offload.cli.text_source import STDIN, read_prompt
from ds_offload.config import OffloadConfig
from ds_offload.errors import InputError
from ds_offload.given_path import given_path
from ds_offload.notices import notice, warn

if TYPE_CHECKING:
    from ds_offload.generation import GenerationOutput
    from ds_offload.generator import OffloadedGenerator
    from ds_offload.sampling import SamplingParams


@config_options
@sampling_options
@model_options
def run(
    model: ModelOptions,
    sampling: dict[str, Any],
    config: OffloadConfig,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="The prompt.", metavar="TEXT")] = None,
    prompt_file: Annotated[
        str | None,
        typer.Option("--prompt-file", "-f", metavar="FILE", help="A text file with the prompt; - is standard input."),
    ] = None,
    question: Annotated[
        str | None,
        typer.Option("--question", "-q", metavar="TEXT", help="A question about the prompt, which is then a document."),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", metavar="", help="Put the prompt through the model's chat template.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", metavar="", help="Print one JSON object and nothing else.")
    ] = False,
    trace: Annotated[
        str | None, typer.Option("--trace", metavar="FILE", help="Write a Chrome trace of a few decode steps.")
    ] = None,
    checkpoint: CheckpointOption = None,
    session: Annotated[
        str | None,
        typer.Option(
            "--session",
            metavar="NAME",
            help="Keep the document read under this name or path: the next --question costs its own tokens only.",
        ),
    ] = None,
    sessions_dir: SessionsDirOption = None,
) -> None:
    """Answer a prompt. The prompt comes from --prompt, --prompt-file or a pipe."""
    if question is not None and not question.strip():
        raise InputError("--question is empty; give a question about the prompt, or leave it out")
    longest = check_sampling(sampling).max_new_tokens
    assert isinstance(longest, int)
    if session is not None:
        from ds_offload.cli.run_session import SessionRun

        if trace is not None:
            raise InputError("--session goes without --trace; leave one of them out")
        if question is None:
            raise InputError("--session needs --question; give a question about the document")
        SessionRun(model, config, session, sessions_dir, question, chat).run(
            prompt, prompt_file, sampling, as_json, checkpoint
        )
        return
    if sessions_dir is not None:
        raise InputError("--sessions-dir is for --session, which was not given; give --session NAME, or leave it out")
    text = read_prompt(prompt, prompt_file)

    if trace is not None:
        from ds_offload.step_trace import check_trace

        read_from = prompt_file if prompt_file is not None and prompt_file != STDIN else None
        if read_from is not None and os.path.exists(trace) and os.path.samefile(read_from, trace):
            raise InputError(f"--trace {trace!r} is the file of the prompt; give another file")
        check_trace(given_path(trace, "trace"), longest)
    from ds_offload.generator import OffloadedGenerator
    from ds_offload.prefill_checkpoint import check_checkpoint_folder
    from ds_offload.preparation import PreparedModel

    prepared = PreparedModel.find(**dataclasses.asdict(model), config=config)
    ids = prepared.encode(build_prompt(text, question, chat, prepared.tokenizer))
    check_stop(sampling, prepared.tokenizer)
    prepared.check_answer(ids, longest)
    if checkpoint is not None:
        # Makes the folder: behind everything else that is refused.
        check_checkpoint_folder(given_path(checkpoint, "checkpoint"))
    with OffloadedGenerator.from_prepared(prepared) as generator:
        answer(generator, ids, sampling, as_json, trace, checkpoint)


def check_sampling(sampling: dict[str, Any]) -> SamplingParams:
    """The sampling options, checked before a model loads.

    Raises:
        InputError: Naming the field.
    """
    from ds_offload.sampling import SamplingParams

    return SamplingParams(**sampling)


def check_stop(sampling: dict[str, Any], tokenizer: Any) -> None:
    """Refuse texts that end the answer where there is no tokenizer to find them.

    Raises:
        InputError: There is none.
    """
    if sampling.get("stop") and tokenizer is None:
        raise InputError("--stop needs a tokenizer, and this model's folder has none; leave --stop out")


def check_chat(chat: bool, tokenizer: Any) -> None:
    """Refuse --chat where the model has no chat template.

    Raises:
        InputError: It has none.
    """
    from ds_offload.prompts import has_chat_template

    if chat and not has_chat_template(tokenizer):
        raise InputError("--chat needs a chat template, and this model has none; leave --chat out")


def build_prompt(text: str, question: str | None, chat: bool, tokenizer: Any) -> Any:
    """What the generator is given: text, messages, or token ids where the model has no tokenizer.

    Raises:
        InputError: A question or a chat without a tokenizer, or text that is no token ids.
    """
    from ds_offload.prompts import document_prompt, parse_token_ids

    if tokenizer is None:
        if question is not None or chat:
            name = "--question" if question is not None else "--chat"
            raise InputError(
                f"{name} needs a tokenizer, and this model's folder has none; give token ids as the prompt without it"
            )
        return parse_token_ids(text)
    check_chat(chat, tokenizer)
    if question is not None:
        return document_prompt(text, question, tokenizer)
    return [{"role": "user", "content": text}] if chat else text


def answer(
    generator: OffloadedGenerator,
    prompt: Any,
    sampling: dict[str, Any],
    as_json: bool,
    trace: str | None = None,
    checkpoint: str | None = None,
) -> None:
    """Generate and print: the text as it comes and a line of figures on stderr, or one JSON object."""
    if as_json:
        with ProgressReport() as progress:
            output = generator.generate(prompt, on_progress=progress, trace=trace, checkpoint=checkpoint, **sampling)
        print_json(generator, output)
        return
    # The answer itself shows how far decoding is, so only the prompt's progress is reported.
    with ProgressReport(phases=("prefill",)) as progress:
        print_pieces(
            generator.stream(prompt, on_progress=progress, trace=trace, checkpoint=checkpoint, **sampling), progress
        )
    assert generator.last_output is not None
    end_text(generator.last_output)


def print_json(generator: OffloadedGenerator, output: GenerationOutput) -> None:
    """Print one JSON object."""
    result = {
        "model": generator.loaded.source.name,
        "text": output.text,
        "token_ids": output.token_ids,
        "prompt_tokens": output.prompt_tokens,
        "new_tokens": len(output.token_ids),
        "finish_reason": output.finish_reason,
        "stats": output.stats,
        "config": generator.config.to_dict(),
    }
    print(json.dumps(result))


def print_pieces(pieces: Iterable[str], progress: ProgressReport) -> None:
    """Print an answer as it comes; progress ends with its first piece."""
    for piece in pieces:
        progress.close()
        sys.stdout.write(piece)
        sys.stdout.flush()


def end_text(output: GenerationOutput) -> None:
    """End a printed answer's last line, and say what it took."""
    if not output.text.endswith("\n"):
        sys.stdout.write("\n")
        sys.stdout.flush()
    monitor = output.stats["monitor"]
    if monitor is not None:
        notice(monitor_line(monitor))
    notice(figures_line(output))
    if monitor is not None and monitor["warning"] is not None:
        warn(monitor["warning"])
