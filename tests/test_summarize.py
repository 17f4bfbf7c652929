"""The prompt of a summary, and documents that do not fit."""

from __future__ import annotations

import re
from typing import Any

import pytest
from tiny_models import tiny_config

from ds_offload.byte_tokenizer import ByteTokenizer
from ds_offload.errors import InputError
from ds_offload.rope_scaling import apply_rope_scaling, original_context, trained_context
from ds_offload.summarize import check_summary_fits, summary_prompt, summary_tokens

PLAIN = ByteTokenizer(256)


class WithTemplate(ByteTokenizer):
    chat_template = "{{ messages[0]['content'] }}"


def test_one_document() -> None:
    task = "Summarize the text above in about 50 words."
    messages = summary_prompt({"book.txt": "A book.\n"}, 50, WithTemplate(256))
    assert messages == [{"role": "user", "content": f"A book.\n\n{task}"}]
    assert summary_prompt({"book.txt": "A book.\n"}, 50, PLAIN) == f"A book.\n\nQuestion: {task}\nAnswer:"


def test_several_documents_carry_their_names() -> None:
    prompt = summary_prompt({"a.txt": "First.\n\n", "b.txt": "Second."}, 50, PLAIN)
    assert prompt.startswith("# a.txt\n\nFirst.\n\n# b.txt\n\nSecond.\n\nQuestion: Summarize the 2 texts above")


@pytest.mark.parametrize(
    ("documents", "words", "tokenizer", "message"),
    [
        ({}, 50, PLAIN, "no document"),
        ({"a.txt": " \n"}, 50, PLAIN, "document 'a.txt' is only white space"),
        ({"a.txt": "text"}, 0, PLAIN, "words=0"),
        ({"a.txt": "text"}, "many", PLAIN, "words='many'"),
        ({"a.txt": "text"}, True, PLAIN, "words=True"),
        ({"a.txt": "text"}, 50, None, "no tokenizer|has none"),
    ],
)
def test_wrong_input(documents: dict[str, str], words: Any, tokenizer: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        summary_prompt(documents, words, tokenizer)


def test_what_fits() -> None:
    """The prompt's tokens and the summary's may fill the context to the last token."""
    documents = {"a.txt": "x" * 100}
    prompt = summary_prompt(documents, 10, PLAIN)
    tokens = len(prompt)

    def check(max_context: int, trained_context: int) -> int:
        return check_summary_fits(
            documents,
            prompt,
            PLAIN,
            max_new_tokens=summary_tokens(10),
            max_context=max_context,
            trained_context=trained_context,
            original_context=trained_context,
        )

    assert check(tokens + 20, 1000) == tokens
    with pytest.raises(InputError) as caught:
        check(tokens + 19, 1000)
    message = str(caught.value)
    assert f"a.txt: {tokens:,} tokens and 20" in message and f"{tokens + 19}" in message
    assert f"--ctx {tokens + 20} or more" in message and "\n" not in message
    with pytest.raises(InputError, match=r"trained for 100;.*--model.*--rope-scaling yarn:2 --ctx"):
        check(100, 100)


@pytest.mark.parametrize(
    ("rope", "scaling"),
    [
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64}, None),
        ({"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}, None),
        ({"rope_type": "default"}, "yarn:8"),
        ({"rope_type": "default"}, "linear:8"),
    ],
)
def test_the_factor_that_is_advised_reaches(rope: dict[str, Any], scaling: str | None) -> None:
    """--rope-scaling stretches the positions before any scaling, whatever the model has or was given."""
    rope |= {"rope_theta": 1e4, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = tiny_config("llama", max_position_embeddings=64 if scaling else 512, rope_parameters=rope)
    if scaling is not None:
        apply_rope_scaling(config, scaling)
    assert (original_context(config), trained_context(config)) == (64, 512)
    documents = {"a.txt": "x" * 1000}
    prompt = summary_prompt(documents, 10, PLAIN)
    with pytest.raises(InputError) as caught:
        check_summary_fits(
            documents,
            prompt,
            PLAIN,
            max_new_tokens=20,
            max_context=512,
            trained_context=trained_context(config),
            original_context=original_context(config),
        )
    advice = re.search(r"--rope-scaling (yarn:\d+) --ctx (\d+)", str(caught.value))
    assert advice is not None
    apply_rope_scaling(config, advice[1])
    assert trained_context(config) >= int(advice[2]) == len(prompt) + 20
