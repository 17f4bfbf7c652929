"""The prompt of a document and a question, cut in two: the same tokens as of the whole."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import ds_offload.document_prompt
from ds_offload.byte_tokenizer import ByteTokenizer
from ds_offload.document_prompt import DocumentPrompt, common_tokens, further_ids
from ds_offload.errors import InputError
from ds_offload.prompts import document_prompt, encode_prompt, render_messages

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = "\n".join(f"{n}. The whale, the  whale!\tCall me\n\nIshmael {n * n}." for n in range(300))
QUESTIONS = ["Who?", "who is it", " a space", "\n\nlines", "\tTab", "1 + 1", "?!", "éa", "A  b", "  ", "the end  "]


def trained(template: str | None, split: bool) -> PreTrainedTokenizerFast:
    """A BPE tokenizer trained on the text; without `split` its tokens cross words and lines."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([TEXT + "".join(QUESTIONS) * 50], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, eos_token="<|im_end|>")


@pytest.fixture(scope="module", params=["template", "plain", "crossing", "crossing plain", "bytes"])
def tokenizer(request: pytest.FixtureRequest) -> object:
    if request.param == "bytes":
        return ByteTokenizer()
    return trained(None if "plain" in request.param else TEMPLATE, "crossing" not in request.param)


@pytest.mark.parametrize("document", [TEXT, TEXT[:400], "a", "  ends with space \n\n "])
@pytest.mark.parametrize("question", QUESTIONS)
def test_the_tokens_are_those_of_the_whole(tokenizer: object, document: str, question: str) -> None:
    prompt, ids = DocumentPrompt.read(document, tokenizer)
    if not question.strip():
        with pytest.raises(InputError, match="the question is only white space"):
            prompt.ids(ids, question, tokenizer)
        return
    whole = prompt.ids(ids, question, tokenizer)
    assert whole == encode_prompt(document_prompt(document, question, tokenizer), tokenizer)
    # Nearly all of the document is read once.
    assert common_tokens(ids, whole) >= len(ids) - 2


@pytest.mark.parametrize("tokenizer", [trained(TEMPLATE, True), trained(None, True), ByteTokenizer()])
def test_a_long_document_is_not_tokenised_again(tokenizer: object) -> None:
    prompt, ids = DocumentPrompt.read(TEXT, tokenizer)
    assert len(prompt.tail) < 4_200 and len(ids) * 0.4 < prompt.before < len(ids)


def test_a_tokenizer_that_looks_far_back_gets_the_whole_text() -> None:
    """One that numbers its words, for one: no part of the text has the tokens that it has in the whole."""

    class Counting(ByteTokenizer):
        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            return [n + len(word) for n, word in enumerate(text.split())]

    prompt, ids = DocumentPrompt.read(TEXT, Counting())
    assert prompt.before == 0 and prompt.tail == TEXT.rstrip()
    assert prompt.ids(ids, "Who?", Counting()) == Counting().encode(f"{TEXT.rstrip()}\n\nQuestion: Who?\nAnswer:")


def test_special_tokens_at_the_beginning_stay_there() -> None:
    class Beginning(ByteTokenizer):
        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            return [300] * add_special_tokens + super().encode(text)

    tokenizer = Beginning()
    prompt, ids = DocumentPrompt.read(TEXT, tokenizer)
    assert prompt.before > 0 and ids[0] == 300 and ids.count(300) == 1
    assert prompt.ids(ids, "Who?", tokenizer) == encode_prompt(document_prompt(TEXT, "Who?", tokenizer), tokenizer)


def test_a_further_question_is_what_the_template_puts_behind_an_answer() -> None:
    tokenizer = trained(TEMPLATE, True)
    end = tokenizer.eos_token_id
    messages = [("user", TEXT[:100]), ("assistant", "Ishmael."), ("user", "Why?")]
    whole = render_messages([{"role": role, "content": content} for role, content in messages], tokenizer)
    behind = whole[whole.index("Ishmael.") + len("Ishmael.") :]
    assert tokenizer.decode(further_ids("Why?", tokenizer, None)) == behind
    assert further_ids("Why?", tokenizer, end) == further_ids("Why?", tokenizer, None)[1:]
    assert further_ids("Why?", tokenizer, end)[0] != end
    plain = ByteTokenizer()
    assert bytes(further_ids("Why?", plain, None)) == b"\n\nQuestion: Why?\nAnswer:"
    with pytest.raises(InputError, match="the question is empty"):
        further_ids("", plain, None)


def test_marks_in_the_texts_do_no_harm() -> None:
    tokenizer = trained(TEMPLATE, True)
    mark = ds_offload.document_prompt._MARK
    document, question = f"{mark} A book {mark}", f"{mark}? {mark}"
    prompt, ids = DocumentPrompt.read(document, tokenizer)
    whole = encode_prompt(document_prompt(document, question, tokenizer), tokenizer)
    assert prompt.ids(ids, question, tokenizer) == whole
    assert mark in tokenizer.decode(further_ids(question, tokenizer, None))


def test_a_template_that_changes_the_text_is_refused() -> None:
    tokenizer = trained(TEMPLATE.replace("| trim", "| upper"), True)
    for read in (
        lambda: DocumentPrompt.read(TEXT, tokenizer),
        lambda: DocumentPrompt("<|im_start|>user\nA BOOK.", 0, "").ids([], "Who?", tokenizer),
        lambda: further_ids("Why?", tokenizer, None),
    ):
        with pytest.raises(InputError, match=r"changes the text it is given, .* `ds-offload run` without --session"):
            read()


@pytest.mark.parametrize("system", [None, "Be brief.", f"{ds_offload.document_prompt._MARK} twice"])
@pytest.mark.parametrize("question", [question for question in QUESTIONS if question == question.strip() != ""])
def test_a_conversation_begins_as_the_template_puts_it(system: str | None, question: str) -> None:
    messages = [{"role": "system", "content": system}] if system is not None else []
    for split in (True, False):
        tokenizer = trained(TEMPLATE, split)
        prompt, ids = DocumentPrompt.opening(tokenizer, system)
        whole = encode_prompt([*messages, {"role": "user", "content": question}], tokenizer)
        assert prompt.ids(ids, question, tokenizer) == whole
        assert common_tokens(ids, whole) >= len(ids) - 1 > 0


def test_where_no_conversation_begins() -> None:
    bare = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    users_only = "{% for m in messages if m['role'] != 'system' %}<|im_start|>{{ m['content'] }}{% endfor %}"
    refusals = [
        (None, None, "needs a tokenizer"),
        (trained(None, True), None, "needs a chat template"),
        (trained(bare, True), None, "nothing before the first message"),
        (trained(users_only, True), "Be brief.", "leaves the system message out"),
        (trained(TEMPLATE, True), " ", "the system message is only white space"),
    ]
    for tokenizer, system, words in refusals:
        with pytest.raises(InputError, match=words):
            DocumentPrompt.opening(tokenizer, system)


@pytest.mark.parametrize("document", ["", " \n", "\ud800"])
def test_what_is_no_document(document: str) -> None:
    with pytest.raises(InputError, match="the document"):
        DocumentPrompt.read(document, ByteTokenizer())
    with pytest.raises(InputError, match="no tokenizer"):
        DocumentPrompt.read("A book.", None)


def test_smollm2(smollm2: Path) -> None:
    from ds_offload.checkpoint_folder import read_tokenizer

    tokenizer = read_tokenizer(smollm2)
    prompt, ids = DocumentPrompt.read(TEXT, tokenizer)
    for question in (question for question in QUESTIONS if question.strip()):
        whole = prompt.ids(ids, question, tokenizer)
        assert whole == encode_prompt(document_prompt(TEXT, question, tokenizer), tokenizer)
        assert common_tokens(ids, whole) == len(ids)
    opening, ids = DocumentPrompt.opening(tokenizer)
    for question in (question for question in QUESTIONS if question == question.strip() != ""):
        whole = opening.ids(ids, question, tokenizer)
        assert whole == encode_prompt([{"role": "user", "content": question}], tokenizer)
        assert common_tokens(ids, whole) == len(ids)
