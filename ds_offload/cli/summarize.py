"""`ds-offload summarize`: whole files, summarised in one context."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from ds_offload.cli.config_options import config_options
from ds_offload.cli.option_groups import ModelOptions, model_options, read_number, sampling_options
from ds_offload.cli.run import answer, check_sampling
from ds_offload.cli.text_source import STDIN, read_stdin, read_text_file
from ds_offload.config import OffloadConfig
from ds_offload.errors import InputError
from ds_offload.summarize import DEFAULT_WORDS, check_summary_fits, summary_prompt, summary_tokens


@config_options
@sampling_options
@model_options
def summarize(
    model: ModelOptions,
    sampling: dict[str, Any],
    config: OffloadConfig,
    files: Annotated[list[str], typer.Argument(help="Text files; - is standard input.", metavar="FILE...")],
    words: Annotated[str, typer.Option("--words", help="About how long the summary should be.", metavar="N")] = str(
        DEFAULT_WORDS
    ),
    as_json: Annotated[
        bool, typer.Option("--json", metavar="", help="Print one JSON object and nothing else.")
    ] = False,
) -> None:
    """Summarize whole text files, all of them in one context."""
    documents = read_documents(files)
    count: Any = read_number(words, int)
    sampling = {"max_new_tokens": summary_tokens(count)} | sampling
    longest = check_sampling(sampling).max_new_tokens
    assert isinstance(longest, int)

    from ds_offload.generator import OffloadedGenerator
    from ds_offload.preparation import PreparedModel
    from ds_offload.rope_scaling import original_context

    prepared = PreparedModel.find(**dataclasses.asdict(model), config=config)
    room = prepared.config.max_context
    assert isinstance(room, int)
    prompt = summary_prompt(documents, count, prepared.tokenizer)
    check_summary_fits(
        documents,
        prompt,
        prepared.tokenizer,
        max_new_tokens=longest,
        max_context=room,
        trained_context=prepared.source.shape.trained_context,
        original_context=original_context(prepared.source.config),
    )
    ids = prepared.encode(prompt)
    prepared.check_answer(ids, longest)
    with OffloadedGenerator.from_prepared(prepared) as generator:
        answer(generator, ids, sampling, as_json)


def read_documents(files: list[str]) -> dict[str, str]:
    """The files' texts by name: the file's own name, or the path as given where two files share a name.

    Raises:
        InputError: A file given twice, or one that cannot be read, is binary or empty.
    """
    shared = Counter(Path(file).name for file in files)
    documents: dict[str, str] = {}
    for file in files:
        name = "standard input" if file == STDIN else Path(file).name if shared[Path(file).name] == 1 else file
        if name in documents or any(_same(file, earlier) for earlier in files[: len(documents)]):
            raise InputError(f"{file!r} was given twice; give each file once")
        documents[name] = read_stdin() if file == STDIN else read_text_file(file)
    return documents


def _same(file: str, earlier: str) -> bool:
    """Whether two arguments are one file, however they are written; one that is not there is none."""
    if STDIN in (file, earlier):
        return file == earlier
    try:
        return os.path.samefile(file, earlier)
    except (OSError, ValueError):
        return False
