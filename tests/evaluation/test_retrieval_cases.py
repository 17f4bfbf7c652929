"""Every made-up question has its answer in its context, found by a program, at any length."""

from __future__ import annotations

import random
import re
from collections.abc import Callable

import pytest

from ds_offload import InputError
from ds_offload.evaluation.haystack import Haystack, sentences, shipped_filler
from ds_offload.evaluation.metrics import found_share
from ds_offload.evaluation.retrieval import (
    ANSWER_TOKENS,
    FOREIGN,
    eval_retrieval,
    make_case,
    parse_kinds,
    token_counter,
)
from ds_offload.evaluation.retrieval_cases import CHAIN, MAKERS, NEEDLES, RetrievalCase
from ds_offload.evaluation.subject import EvalSubject

MakeSubject = Callable[..., EvalSubject]


def count(text: str) -> int:
    return len(text.split())


def make(kind: str, room: int, seed: int = 0) -> RetrievalCase:
    hay = Haystack(shipped_filler(), count)
    return MAKERS[kind](hay, room, count, random.Random(seed))


def solve(case: RetrievalCase) -> list[str]:
    """The answer by a program that reads the context and the question only."""
    if case.task == "passkey":
        return re.findall(r"The pass key is (\d+)\.", case.context)
    if case.task == "needles":
        codes = dict(re.findall(r"The access code for (\w+) is (\d+)\.", case.context))
        assert len(codes) == NEEDLES
        asked = re.search(r"code for (\w+)\?", case.question)
        assert asked is not None
        return [codes[asked[1]]]
    if case.task == "key-value":
        pairs = dict(line.split(": ") for line in case.context.splitlines())
        asked = re.search(r"the key (\w+) in", case.question)
        assert asked is not None
        return [pairs[asked[1]]]
    values: dict[str, str] = {}
    for name, source in re.findall(r"VAR (\w+) = (\w+)\.", case.context):
        # A chain stays in order: what a variable is set to is known before.
        values[name] = source if source.isdigit() else values[source]
    asked = re.search(r"value (\d+),", case.question)
    assert asked is not None
    return [name for name, value in values.items() if value == asked[1]]


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("room", [120, 1000, 9001])
@pytest.mark.parametrize("seed", range(4))
def test_a_program_finds_the_answer(kind: str, room: int, seed: int) -> None:
    case = make(kind, room, seed)
    assert solve(case) == list(case.answers)
    assert len(case.answers) == (CHAIN if kind == "tracing" else 1)
    assert found_share(" ".join(case.answers), case.answers) == 1
    # The question does not give it away.
    assert found_share(case.question, case.answers) == 0
    assert room - 60 <= count(case.context) <= room


@pytest.mark.parametrize("kind", MAKERS)
def test_a_seed_gives_the_same_case_and_another_a_different_one(kind: str) -> None:
    assert make(kind, 400) == make(kind, 400)
    assert make(kind, 400, 1) != make(kind, 400, 2)


def test_facts_stand_at_different_places() -> None:
    places = {make("passkey", 2000, seed).context.index("The pass key is") * 4 // 12000 for seed in range(20)}
    assert len(places) >= 3


def test_too_short_a_context_is_refused() -> None:
    for kind in MAKERS:
        with pytest.raises(InputError, match="raise --ctx"):
            make(kind, 1)


def test_filler_is_cut_into_whole_sentences() -> None:
    assert sentences("One two three four. Five six seven eight! Too short.\n\nA heading without a stop") == [
        "One two three four.",
        "Five six seven eight!",
        "A heading without a stop.",
    ]
    with pytest.raises(InputError, match="no sentence"):
        sentences("Too short.")
    with pytest.raises(InputError, match="every sentence"):
        Haystack("The pass key is none of them.", count, FOREIGN)


def test_kinds_are_read() -> None:
    assert parse_kinds("passkey, tracing") == ("passkey", "tracing")
    with pytest.raises(InputError, match="names 'passkeys'"):
        parse_kinds("passkeys")
    with pytest.raises(InputError, match="is empty"):
        parse_kinds(" ,")


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("context", [1024, 3000])
def test_the_prompt_fills_the_context_and_leaves_room_for_the_answer(
    kind: str, context: int, subject_of: MakeSubject
) -> None:
    subject = subject_of(max_context=context)
    counter = token_counter(subject)
    case, ids = make_case(subject, kind, Haystack(shipped_filler(), counter, FOREIGN), counter, 0)
    assert context - ANSWER_TOKENS[kind] - 800 <= len(ids) <= context - ANSWER_TOKENS[kind]
    assert solve(case) == list(case.answers)


def test_dense_and_sparse_answer_the_same_cases(subject_of: MakeSubject) -> None:
    result = eval_retrieval(subject_of(max_context=800), ("passkey", "key-value"), limit=2, seed=5)
    dense, sparse = result.dense, result.sparse
    assert dense["cases"] == sparse["cases"] == 4
    assert [row["expected"] for row in dense["answers"]] == [row["expected"] for row in sparse["answers"]]
    assert dense.keys() == {"score", "cases", "passkey", "key-value", "answers"}
    assert result.delta == sparse["score"] - dense["score"]
    assert result.density is not None and 0.1 < result.density < 0.2


def test_contexts_within_the_budget_are_refused(subject_of: MakeSubject) -> None:
    with pytest.raises(InputError, match="keeps all of every one of the 1 contexts"):
        eval_retrieval(subject_of(max_context=800, token_budget=800), ("passkey",), limit=1)
