"""Prompts of every kind against what transformers makes of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ds_offload.errors import InputError
from ds_offload.prompts import check_text, document_prompt, encode_prompt, has_chat_template, is_batch, parse_token_ids

TEMPLATE = (
    "{% for message in messages %}{% if message['role'] not in ['user', 'assistant'] %}"
    "{{ raise_exception('Only user and assistant roles\nare known') }}{% endif %}"
    "<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_tokenizer(chat_template: str | None) -> PreTrainedTokenizerFast:
    """Bytes as tokens, and a first token of its own as Llama's tokenizers add one."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={"<s>": 0, **{c: i + 1 for i, c in enumerate(alphabet)}}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", chat_template=chat_template, model_max_length=16
    )


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(TEMPLATE)


@pytest.fixture(scope="module")
def plain_tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(None)


@pytest.mark.parametrize(
    "text", ["Hello", "  two spaces ", "🐋 é\r\n", "a NUL \0 inside", "longer than 16 tokens " * 9]
)
def test_text_as_the_tokenizer_gives_it(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = encode_prompt(text, tokenizer)
    assert ids == tokenizer(text)["input_ids"]
    assert ids[0] == 0 and len(ids) == len(text.encode()) + 1


def test_long_text_gives_no_warning(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    encode_prompt("longer than sixteen tokens " * 9, make_tokenizer(TEMPLATE))
    encode_prompt([{"role": "user", "content": "longer than sixteen tokens " * 9}], make_tokenizer(TEMPLATE))
    assert capsys.readouterr().err == "" and not caplog.records


def test_messages_through_the_chat_template(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    ids = encode_prompt(messages, tokenizer)
    assert ids == tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert all(type(token) is int for token in ids)
    assert tokenizer.decode(ids) == "<user>Hi\n<assistant>Yes?\n<assistant>"


def test_ids_pass_through(tokenizer: PreTrainedTokenizerFast) -> None:
    for ids in ([5, 6, 7], (5, 6, 7), list(np.array([5, 6, 7]))):
        for kind in (tokenizer, None):
            got = encode_prompt(ids, kind, vocab_size=8)
            assert got == [5, 6, 7] and all(type(token) is int for token in got)


WRONG: dict[str, tuple[Any, str]] = {
    "empty text": ("", "empty"),
    "white space": (" \n\t", "white space"),
    "empty list": ([], "empty list"),
    "None": (None, "NoneType"),
    "a number": (7, "int"),
    "a dict": ({"role": "user", "content": "Hi"}, "dict"),
    "bytes": (b"Hi", "bytes"),
    "floats": ([1.0, 2.0], "1.0 is not a token id"),
    "booleans": ([True], "True is not a token id"),
    "texts and ids": ([1, "a"], "'a' is not a token id"),
    "negative": ([1, -1], "token id -1"),
    "beyond the vocabulary": ([1, 257], "0 to 256"),
    "half a character": ("a\ud800b", "position 1"),
    "message without content": ([{"role": "user"}], "is not a message"),
    "content of parts": ([{"role": "user", "content": [{"type": "text"}]}], "is not a message"),
    "empty message": ([{"role": "user", "content": " "}], "white space"),
    "text among messages": ([{"role": "user", "content": "Hi"}, "Hi"], "'Hi' is not a message"),
    "refused by the template": ([{"role": "robot", "content": "Hi"}], "Only user and assistant roles are known"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_prompts(tokenizer: PreTrainedTokenizerFast, case: str) -> None:
    prompt, words = WRONG[case]
    with pytest.raises(InputError) as caught:
        encode_prompt(prompt, tokenizer, vocab_size=257)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ({"tool_use": TEMPLATE}, "ValueError: "),
        ("{{ 1 + messages[0].content }}", "TypeError: unsupported operand"),
        ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
    ],
)
def test_a_template_that_fails_is_one_line(template: Any, words: str) -> None:
    tokenizer = make_tokenizer(template)
    with pytest.raises(InputError, match="the model's chat template fails on these messages") as caught:
        encode_prompt([{"role": "user", "content": "Hi"}], tokenizer)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_text_and_messages_need_a_tokenizer(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError, match="no tokenizer"):
        encode_prompt("Hello", None)
    for tokenizer in (None, plain_tokenizer):
        with pytest.raises(InputError, match="no chat template"):
            encode_prompt([{"role": "user", "content": "Hi"}], tokenizer)


def test_a_text_of_no_known_token() -> None:
    nothing = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="?")))
    with pytest.raises(InputError, match="no token"):
        encode_prompt("!", lambda text: {"input_ids": []})
    assert encode_prompt("a", nothing) == [0]


@pytest.mark.parametrize(
    ("prompt", "batch"),
    [
        ("text", False),
        ([1, 2], False),
        ((1, 2), False),
        ([{"role": "user", "content": "Hi"}], False),
        ([], False),
        (["a"], True),
        (("a", "b"), True),
        ([[1, 2], [3]], True),
        ([[{"role": "user", "content": "Hi"}], "a", [1]], True),
        ([[]], True),
    ],
)
def test_is_batch(prompt: Any, batch: bool) -> None:
    assert is_batch(prompt) is batch


@pytest.mark.parametrize("text", ["1 15 27", "1,15,27", "[1, 15, 27]\n", " 1\n15\t27 "])
def test_parse_token_ids(text: str) -> None:
    assert parse_token_ids(text) == [1, 15, 27]


@pytest.mark.parametrize("text", ["", "[]", " \n", "1 two 3", "1.5", "-3", "1 ٣", "9" * 40])
def test_parse_token_ids_refuses(text: str) -> None:
    with pytest.raises(InputError):
        parse_token_ids(text)


def test_document_prompt(tokenizer: PreTrainedTokenizerFast, plain_tokenizer: PreTrainedTokenizerFast) -> None:
    assert has_chat_template(tokenizer) and not has_chat_template(plain_tokenizer) and not has_chat_template(None)
    assert document_prompt("A book.\n", "Who?", tokenizer) == [{"role": "user", "content": "A book.\n\nWho?"}]
    assert document_prompt("A book.\n", "Who?", plain_tokenizer) == "A book.\n\nQuestion: Who?\nAnswer:"
    assert document_prompt("A book.\n", None, tokenizer) == [{"role": "user", "content": "A book.\n"}]
    assert document_prompt("A book.\n", None, None) == "A book.\n"


def test_check_text_names_what_is_empty() -> None:
    check_text("a")
    with pytest.raises(InputError, match=r"book\.txt is empty"):
        check_text("", "book.txt")
