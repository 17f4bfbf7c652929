from __future__ import annotations

import random
import re
from itertools import groupby, pairwise

import numpy as np
import pytest
from chat_tokenizer import END, chat_tokenizer

from ds_offload.evaluation.haystack import shipped_filler
from ds_offload.evaluation.retrieval_cases import CITIES
from ds_offload.prompts import render_messages
from long_context.training_data import TrainingData, exchanged
from long_context.training_sequences import ANSWER, FACT, PLAIN, TASKS, TEXT, ChatFrame, SequenceMaker
from long_context.training_tasks import CHAIN, NAMES, prose_facts
from long_context.training_texts import without, word_runs

TOKENIZER = chat_tokenizer()
LENGTH = 6000


@pytest.fixture(scope="module")
def maker() -> SequenceMaker:
    return SequenceMaker({"text": shipped_filler()}, TOKENIZER)


def spans(ids: np.ndarray, kinds: np.ndarray) -> list[tuple[int, str]]:
    """Neighbours of one kind, as text."""
    runs = [(kind, [place for place, _ in run]) for kind, run in groupby(enumerate(kinds), lambda pair: pair[1])]
    return [(int(kind), TOKENIZER.decode(ids[places])) for kind, places in runs]


def test_no_name_is_one_of_the_evaluation() -> None:
    assert len(NAMES) == len(set(NAMES))
    assert not set(NAMES) & set(CITIES)


def test_a_chat_is_what_the_template_makes_of_its_messages(maker: SequenceMaker) -> None:
    ids, _ = maker.prose(LENGTH, random.Random(1))
    text = TOKENIZER.decode(ids)
    while text.endswith(END):
        text = text.removesuffix(END)
    said = re.findall(r"(?s)<\|im_start\|>(\w+)\n(.*?)(?:<\|im_end\|>|\Z)", text)
    messages = [{"role": role, "content": content} for role, content in said]
    assert len(messages) >= 4
    assert [message["role"] for message in messages] == ["user", "assistant"] * (len(messages) // 2)
    assert render_messages(messages, TOKENIZER).startswith(text)
    assert ChatFrame.of(TOKENIZER).answer == f"{END}\n<|im_start|>assistant\n"


@pytest.mark.parametrize("seed", range(4))
def test_every_answer_in_prose_follows_from_the_facts(maker: SequenceMaker, seed: int) -> None:
    ids, kinds = maker.prose(LENGTH, random.Random(seed))
    assert ids.shape == kinds.shape == (LENGTH,)
    parts = spans(ids, kinds)
    facts = "".join(text for kind, text in parts if kind <= FACT).split("<|im_end|>")[0]
    asked = [(before[1], *part) for before, part in pairwise(parts) if part[0] >= ANSWER]
    assert asked
    for question, kind, answer in asked:
        assert answer.endswith(END)
        words = re.findall(r"\w+", answer.removesuffix(END))
        if TASKS[kind - ANSWER] == "tracing":
            value = re.search(r"the value (\d+)", question)
            assert value is not None
            expected, source = [], value[1]
            for _ in range(CHAIN):
                found = re.search(rf"VAR (\w+) = {source}\.", facts)
                assert found is not None
                expected.append(source := found[1])
            assert words == expected
        else:
            assert len(words) == 1
            named = re.search(r"(?:for|in|does|to) ([A-Z]\w+)", question.splitlines()[-2])
            line = next(line for line in re.split(r"(?<=\.) ", facts) if words[0] in line)
            assert named is None or named[1] in line


@pytest.mark.parametrize("seed", range(6))
def test_every_value_of_a_list_stands_behind_its_key(maker: SequenceMaker, seed: int) -> None:
    ids, kinds = maker.key_values(LENGTH, random.Random(seed))
    text = TOKENIZER.decode(ids)
    pairs = dict(re.findall(r"([\w-]+): (\d{5})", text.split("\n\n")[0]))
    parts = spans(ids, kinds)
    asked = 0
    for number, (kind, answer) in enumerate(parts):
        if kind < ANSWER:
            continue
        before = parts[number - 1][1]
        single = re.search(r"the key (\S+) in the list", before)
        of_one = single is not None and TASKS[kind - ANSWER] == "key-value"
        key = single[1] if of_one else before.splitlines()[-1].removesuffix(": ")
        assert answer.removesuffix(END) == pairs[key]
        asked += 1
    assert asked >= 5
    # The sequence is used up to about one more question.
    assert (ids == TOKENIZER.eos_token_id)[-400:].sum() < 400


def test_text_is_learnt_whole(maker: SequenceMaker) -> None:
    ids, kinds = maker.text(500, random.Random(0))
    assert (kinds == TEXT).all()
    assert TOKENIZER.decode(ids) in shipped_filler()


def test_digits_of_facts_and_answers_are_exchanged_alike_and_others_stay() -> None:
    tokens = np.array([10, 11, 12, 19, 10, 11, 12], np.uint16)
    kinds = np.array([TEXT, FACT, FACT, FACT, PLAIN, ANSWER, ANSWER + 2], np.uint8)
    digits = np.array([3, 0, 1, 2, 4, 5, 6, 7, 8])
    assert exchanged(tokens, kinds, 11, digits).tolist() == [10, 14, 11, 19, 10, 14, 11]


def test_the_file_comes_back_and_every_sequence_is_used_once_before_one_is_again(maker, tmp_path) -> None:
    digit = TOKENIZER.convert_tokens_to_ids("1")
    made = TrainingData.make(maker, digit, {1500: 9000}, "seed")
    made.save(tmp_path / "data.npz")
    data = TrainingData.load(tmp_path / "data.npz")
    assert data.first_digit == digit
    np.testing.assert_array_equal(data.tokens[1500], made.tokens[1500])
    _, kinds = data.batch(1500, 0, 6, seed=3)
    assert sorted(map(bytes, kinds)) == sorted(map(bytes, made.kinds[1500]))
    again, kinds_again = data.batch(1500, 6, 6, seed=3)
    assert sorted(map(bytes, kinds_again)) == sorted(map(bytes, kinds))
    assert again.dtype == np.int64


def test_facts_have_as_many_turns_as_answers() -> None:
    facts, turns = prose_facts(random.Random(0), named=10, chains=2)
    assert len(facts) == len([turn for turn in turns if turn.task != "tracing"]) + 2 * CHAIN
    values = [turn.answer[0][0] for turn in turns if turn.task in ("passkey", "needles")]
    assert all(sum(value in fact for fact in facts) == 1 for value in values)


def test_paragraphs_that_share_ten_words_with_a_held_out_text_are_left_out() -> None:
    shared = "one two three four five six seven eight nine ten"
    text = f"Kept as it is.\n\nHere {shared}, eleven.\n\nAnd: one two three four five six seven eight nine, ten or so."
    kept = without([text], word_runs([f"They say {shared} and more."]))
    assert "Kept as it is." in kept
    assert "Here one two" not in kept
    assert "or so" not in kept
    assert without([text], word_runs(["something else entirely"])).rstrip() == text
