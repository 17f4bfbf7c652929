"""Whole documents summarised in one context: the prompt, and whether it fits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ds_offload.errors import InputError
from ds_offload.prompts import check_text, document_prompt, encode_prompt

DEFAULT_WORDS = 200
TOKENS_PER_WORD = 2  # English takes about 1.4; the rest is room to end a sentence


def summary_tokens(words: int) -> int:
    """Tokens that a summary of about `words` words may take.

    Raises:
        InputError: Not a whole number of at least 1.
    """
    if isinstance(words, bool) or not isinstance(words, int) or words < 1:
        raise InputError(f"words={words!r} must be a whole number of at least 1, such as {DEFAULT_WORDS}")
    return TOKENS_PER_WORD * words


def summary_prompt(documents: Mapping[str, str], words: int, tokenizer: Any) -> Any:
    """The documents in full, then the task; for `OffloadedGenerator.generate` or `stream`.

    Args:
        documents: Texts by name. Names are shown to the model where there are several.
        words: About how long the summary should be.
        tokenizer: The model's; its chat template is used where it has one.

    Raises:
        InputError: No document, an empty one, or no tokenizer.
    """
    summary_tokens(words)
    if not documents:
        raise InputError("there is no document to summarize; give at least one text file")
    if tokenizer is None:
        raise InputError("a summary needs a tokenizer, and this model's folder has none; choose another model")
    for name, text in documents.items():
        check_text(text, f"document {name!r}")
    if len(documents) == 1:
        document, what = next(iter(documents.values())), "text"
    else:
        document = "\n\n".join(f"# {name}\n\n{text.strip()}" for name, text in documents.items())
        what = f"{len(documents)} texts"
    return document_prompt(document, f"Summarize the {what} above in about {words} words.", tokenizer)


def check_summary_fits(
    documents: Mapping[str, str],
    prompt: Any,
    tokenizer: Any,
    *,
    max_new_tokens: int,
    max_context: int,
    trained_context: int,
    original_context: int,
) -> int:
    """Refuse documents that do not fit the context together with their summary.

    Args:
        trained_context: Positions the model claims, its RoPE scaling included.
        original_context: Positions before any scaling, which is what --rope-scaling stretches.

    Returns:
        Tokens of the prompt.

    Raises:
        InputError: One line with the documents' tokens, the limit, and what to do.
    """
    tokens = len(encode_prompt(prompt, tokenizer))
    needed = tokens + max_new_tokens
    if needed <= max_context:
        return tokens
    names = ", ".join(documents)
    line = (
        f"{names}: {tokens:,} tokens and {max_new_tokens:,} for the summary are more than the context of "
        f"{max_context:,} tokens"
    )
    if needed <= trained_context:
        raise InputError(f"{line}; set --ctx {needed} or more (the model was trained for {trained_context:,})")
    factor = math.ceil(needed / original_context)
    raise InputError(
        f"{line}, and the model was trained for {trained_context:,}; choose a model for longer texts with --model, "
        f"stretch this one with --rope-scaling yarn:{factor} --ctx {needed}, or shorten the text"
    )
