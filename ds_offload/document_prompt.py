"""The prompt of a document and its questions, in tokens that stay the same whatever is asked."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from ds_offload.errors import InputError
from ds_offload.prompts import check_text, encode_prompt, has_chat_template, render_messages, tokenize

if TYPE_CHECKING:
    from ds_offload.loading import LoadedModel

# Stands for a text in the chat template, to find what the template puts around it.
_MARK = "<<text goes here>>"
# Questions whose first characters merge with what stands before them in different ways, if at all.
_PROBES = ("A", "the", "1", "\n.", "\u00e9")
# Characters at the end of the prompt that are tokenised with every question. Tokens further back depend on none.
_TAIL = (1_000, 4_000)
_QUESTION = "one text, or one list of token ids"


@dataclass(frozen=True)
class DocumentPrompt:
    """Where questions go behind a document that was given as text, or the first message where there is none.

    The prompt is that of `document_prompt` (ds_offload/prompts.py): tokenised as a whole it
    gives the same ids as `ids` of the document and the question, which tokenises the end alone.

    Attributes:
        tail: The end of the prompt's text, up to the end of the document.
        before: Tokens that stand before the tail's; 0 where the tail is all of it.
        sha256: Of the document's text, in hex; "" where a conversation begins without a document.
    """

    tail: str
    before: int
    sha256: str

    @classmethod
    def read(cls, document: str, tokenizer: Any) -> tuple[DocumentPrompt, list[int]]:
        """The prompt of a document, and its first tokens, which are those of any question about it.

        Raises:
            InputError: An empty document, no tokenizer, or a document too short to have tokens of its own, or
                a chat template that changes the text it is given.
        """
        check_text(document, "the document")
        if tokenizer is None:
            raise InputError(
                "the document is a text, but this model's folder has no tokenizer; "
                "give a list of token ids, or put tokenizer.json into the folder"
            )
        text = document.rstrip()
        if has_chat_template(tokenizer):
            content = f"{text}\n\n{_MARK}"
            rendered = render_messages([{"role": "user", "content": content}], tokenizer)
            text = _around(rendered.rpartition(_MARK))[0].removesuffix("\n\n")
        whole = cls(text, 0, hashlib.sha256(document.encode()).hexdigest())
        first = whole.ids([], _PROBES[0], tokenizer)
        prompt = whole._shortened(first, tokenizer) or whole
        ids = prompt._shared(first, tokenizer)
        if not ids:
            raise InputError("the document has no token of its own; give a longer one")
        return prompt, ids

    @classmethod
    def opening(cls, tokenizer: Any, system: str | None = None) -> tuple[DocumentPrompt, list[int]]:
        """What the chat template puts before the first message of a conversation, and its tokens.

        Args:
            system: The text of a system message that comes first; None leaves it to the template.

        Raises:
            InputError: No tokenizer, no chat template, one that refuses the system message or begins with the message.
        """
        if tokenizer is None:
            raise InputError(
                "a conversation needs a tokenizer, and this model's folder has none; put tokenizer.json into the folder"
            )
        if not has_chat_template(tokenizer):
            raise InputError(
                "a conversation needs a chat template, and this model has none; give a document, or another model"
            )
        messages = [{"role": "user", "content": _MARK}]
        if system is not None:
            check_text(system, "the system message")
            messages.insert(0, {"role": "system", "content": system})
        prompt = cls(_around(render_messages(messages, tokenizer).rpartition(_MARK))[0], 0, "")
        if system is not None and system.strip() not in prompt.tail:
            raise InputError("the model's chat template leaves the system message out; leave it out, too")
        ids = prompt._shared(prompt.ids([], _PROBES[0], tokenizer), tokenizer)
        if not ids:
            raise InputError(
                "the model's chat template has nothing before the first message, where a conversation begins; "
                "give a document"
            )
        return prompt, ids

    def _shared(self, first: list[int], tokenizer: Any) -> list[int]:
        """Those tokens of `first`, the prompt of the first probe, that stay the same whatever is asked."""
        others = (self.ids(first, question, tokenizer) for question in _PROBES[1:])
        return first[: min(common_tokens(first, other) for other in others)]

    def _shortened(self, whole: list[int], tokenizer: Any) -> DocumentPrompt | None:
        """The same with a short tail, if the tokens are those of the `whole` prompt of the first probe."""
        cut = self.tail.rfind("\n", max(0, len(self.tail) - _TAIL[1]), max(0, len(self.tail) - _TAIL[0]))
        if cut <= 0:
            return None
        head = tokenize(self.tail[:cut], tokenizer, not has_chat_template(tokenizer))
        shorter = replace(self, tail=self.tail[cut:], before=len(head))
        return shorter if head and shorter.ids(head, _PROBES[0], tokenizer) == whole else None

    def ids(self, document: list[int], question: str, tokenizer: Any) -> list[int]:
        """Token ids of the whole prompt.

        Args:
            document: The document's, as `read` gave them; the first `before` are taken over.
        """
        check_text(question, "the question")
        special = not self.before and not has_chat_template(tokenizer)
        behind = _behind(question, tokenizer, "\n\n" if self.sha256 else "")
        return document[: self.before] + tokenize(self.tail + behind, tokenizer, special)


def conversation_ids(
    known: list[int],
    document: DocumentPrompt | None,
    document_tokens: int,
    question: str | list[int],
    loaded: LoadedModel,
) -> list[int]:
    """Token ids of a session's context with a question.

    Args:
        known: Those of the context so far, the first `document_tokens` of them the document's.
        document: How the document was read; None where it was given as token ids.
        question: A text, or token ids that are appended as they are.
    """
    tokenizer = loaded.tokenizer
    if not isinstance(question, str):
        if not isinstance(question, Iterable) or isinstance(question, bytes | bytearray | Mapping):
            raise InputError(f"the question is of type {type(question).__name__}; it must be {_QUESTION}")
        given: list[Any] = list(question)
        if any(isinstance(entry, str | Mapping) for entry in given):
            raise InputError(f"the question is a list that begins with {given[0]!r:.60}; it must be {_QUESTION}")
        return known + encode_prompt(given, tokenizer, loaded.source.shape.vocab_size)
    if document is not None and len(known) == document_tokens:
        return document.ids(known, question, tokenizer)
    if document is not None:
        return known + further_ids(question, tokenizer, known[-1] if known[-1] in loaded.eos_token_ids else None)
    encode_prompt(question, tokenizer)
    return known + tokenize(question, tokenizer, special=False)


def further_ids(question: str, tokenizer: Any, last: int | None) -> list[int]:
    """Token ids that a further question adds behind an answer.

    Args:
        last: The answer's last token where it is one that ends answers; it is not added again.
    """
    check_text(question, "the question")
    if not has_chat_template(tokenizer):
        return tokenize(f"\n\nQuestion: {question}\nAnswer:", tokenizer, special=False)
    messages = [("user", "?"), ("assistant", _MARK), ("user", question)]
    rendered = render_messages([{"role": role, "content": content} for role, content in messages], tokenizer)
    ids = tokenize(_around(rendered.partition(_MARK))[1], tokenizer, special=False)
    return ids[1:] if ids[0] == last else ids


def common_tokens(first: list[int], second: list[int]) -> int:
    """How many tokens two prompts share from the beginning on."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def _behind(question: str, tokenizer: Any, between: str) -> str:
    """The prompt's text behind the document, from which `between` parts the question."""
    if not has_chat_template(tokenizer):
        return f"\n\nQuestion: {question}\nAnswer:"
    rendered = render_messages([{"role": "user", "content": f"{_MARK}{between}{question}"}], tokenizer)
    return _around(rendered.partition(_MARK))[1]


def _around(parts: tuple[str, str, str]) -> tuple[str, str]:
    """The text before the mark and behind it.

    Raises:
        InputError: The template left no mark.
    """
    before, mark, behind = parts
    if not mark:
        raise InputError(
            "the model's chat template changes the text it is given, so nothing can be read before the questions; "
            "use `ds-offload run` without --session"
        )
    return before, behind
