"""Prompts of every kind (text, messages, token ids) to token ids."""

from __future__ import annotations

import operator
import re
from typing import Any

from ds_offload.errors import InputError

_KINDS = "a text, a list of messages such as {'role': 'user', 'content': 'Hello'}, or a list of token ids"


def is_batch(prompt: Any) -> bool:
    """Whether `prompt` is several prompts.

    A list whose first entry is a text or a list is a batch. A list of integers is one
    prompt, and a list of messages is one conversation.
    """
    return isinstance(prompt, list | tuple) and bool(prompt) and isinstance(prompt[0], str | list | tuple)


def has_chat_template(tokenizer: Any) -> bool:
    """Whether messages can be put to `tokenizer`."""
    return bool(getattr(tokenizer, "chat_template", None))


def encode_prompt(prompt: Any, tokenizer: Any, vocab_size: int | None = None) -> list[int]:
    """Token ids of one prompt.

    Args:
        prompt: A text, taken as `tokenizer(text)["input_ids"]` gives it; a list of
            messages, put through the chat template with the opening of the answer; or a
            list of token ids.
        tokenizer: The model's tokenizer, or None where it has none.
        vocab_size: Tokens that the model knows; ids from there on are refused.

    Raises:
        InputError: An empty prompt, one of another kind, text without a tokenizer,
            messages without a chat template, an id outside the vocabulary.
    """
    if isinstance(prompt, str):
        check_text(prompt)
        if tokenizer is None:
            raise InputError(
                "the prompt is a text, but this model's folder has no tokenizer; "
                "give a list of token ids, or put tokenizer.json into the folder"
            )
        ids = tokenize(prompt, tokenizer)
    elif not isinstance(prompt, list | tuple):
        raise InputError(f"the prompt is of type {type(prompt).__name__}; it must be {_KINDS}")
    elif not prompt:
        raise InputError(f"the prompt is an empty list; give {_KINDS}")
    elif isinstance(prompt[0], dict):
        ids = _encode_messages(list(prompt), tokenizer)
    else:
        ids = [_token_id(entry) for entry in prompt]
    if not ids:
        raise InputError("the prompt has no token that the tokenizer knows; give a text it was made for")
    limit = vocab_size if vocab_size is not None else max(ids) + 1
    outside = next((token for token in ids if not 0 <= token < limit), None)
    if outside is not None:
        needed = f"0 to {vocab_size - 1}" if vocab_size is not None else "0 or more"
        raise InputError(f"token id {outside} is outside the model's vocabulary; ids must be {needed}")
    return ids


def check_text(text: str, what: str = "the prompt") -> None:
    """Refuse a text with nothing in it, or one that is not Unicode.

    Raises:
        InputError: Naming `what`.
    """
    if not text.strip():
        kind = "only white space" if text else "empty"
        raise InputError(f"{what} is {kind}; give a text with at least one word")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{what} has a character at position {error.start} that is not Unicode text; give it as UTF-8"
        ) from None


def parse_token_ids(text: str) -> list[int]:
    """Token ids written with spaces, commas or new lines between them, brackets around allowed.

    Raises:
        InputError: Nothing there, or an entry that is not a whole number.
    """
    entries = re.split(r"[\s,]+", text.strip().removeprefix("[").removesuffix("]").strip())
    if entries == [""]:
        raise InputError("the prompt is empty; give token ids such as 1 15 27")
    wrong = next((entry for entry in entries if re.fullmatch(r"[0-9]{1,18}", entry) is None), None)
    if wrong is not None:
        raise InputError(
            f"{wrong[:40]!r} is not a token id; this model's folder has no tokenizer, so give ids such as 1 15 27"
        )
    return [int(entry) for entry in entries]


def document_prompt(document: str, question: str | None, tokenizer: Any) -> str | list[dict[str, str]]:
    """A prompt that puts a question or a task after a document.

    Returns:
        Messages where the tokenizer has a chat template, else plain text. Without a
        question the document is the prompt.
    """
    if has_chat_template(tokenizer):
        content = document if question is None else f"{document.rstrip()}\n\n{question}"
        return [{"role": "user", "content": content}]
    return document if question is None else f"{document.rstrip()}\n\nQuestion: {question}\nAnswer:"


def tokenize(text: str, tokenizer: Any, special: bool = True) -> list[int]:
    """Token ids of a text, without transformers' warning about texts longer than the trained length.

    Args:
        special: Whether the tokenizer adds its special tokens, such as one for the beginning.
    """
    options: dict[str, Any] = {"verbose": False} if hasattr(tokenizer, "model_max_length") else {}
    if not special:
        options["add_special_tokens"] = False
    return list(tokenizer(text, **options)["input_ids"])


def render_messages(messages: list[dict[str, str]], tokenizer: Any) -> str:
    """The text that the chat template makes of messages, with the opening of the answer.

    Raises:
        InputError: The template refuses them, or fails.
    """
    return str(_apply_template(messages, tokenizer, tokenize=False))


def _token_id(entry: Any) -> int:
    if isinstance(entry, bool):
        raise InputError(f"{entry!r} is not a token id; the prompt must be {_KINDS}")
    try:
        return operator.index(entry)
    except TypeError:
        raise InputError(f"{entry!r:.60} is not a token id; the prompt must be {_KINDS}") from None


def _encode_messages(messages: list[Any], tokenizer: Any) -> list[int]:
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise InputError(f"{message!r:.60} is not a message; give {{'role': 'user', 'content': 'Hello'}}")
        check_text(message["content"], f"the message of role {message['role']!r}")
    if not has_chat_template(tokenizer):
        raise InputError("the prompt is a list of messages, but this model has no chat template; give a text instead")
    options = {"tokenize": True, "return_dict": True, "tokenizer_kwargs": {"verbose": False}}
    return list(_apply_template(messages, tokenizer, **options)["input_ids"])


def _apply_template(messages: list[Any], tokenizer: Any, **options: Any) -> Any:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, **options)
    except TemplateError as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"the model's chat template refuses these messages: {reason}") from None
    except Exception as error:
        # A template is a program of the checkpoint's: it may fail in any way.
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise InputError(
            f"the model's chat template fails on these messages ({reason}); correct it in the model's folder"
        ) from error
