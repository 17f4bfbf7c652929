"""The script that evaluates a context length under several budgets: a line of JSON for each text and each answer."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable

import pytest
from evaluate_long_context import retrieval, text_figures

from ds_offload.evaluation.retrieval import eval_retrieval
from ds_offload.evaluation.subject import EvalSubject

MakeSubject = Callable[..., EvalSubject]


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_answers_are_those_of_the_evaluation(subject_of: MakeSubject, capsys: pytest.CaptureFixture[str]) -> None:
    subject = subject_of(max_context=800)
    other = dataclasses.replace(subject.config, token_budget="1/4")
    retrieval(subject, {"1/8": subject.config, "1/4": other}, ("passkey", "key-value"), 2, math.inf)
    lines = lines_of(capsys)
    assert [(line["kind"], line["case"]) for line in lines] == [
        ("passkey", 1), ("key-value", 1), ("passkey", 2), ("key-value", 2)
    ]  # fmt: skip
    expected = eval_retrieval(subject, ("passkey", "key-value"), limit=2)
    for name, figures in (("dense", expected.dense), ("1/8", expected.sparse)):
        answers = {(row["group"], row["prompt_tokens"]): row["answer"] for row in figures["answers"]}
        assert {(line["kind"], line["tokens"]): line["answers"][name] for line in lines} == answers
    assert {tuple(line["found"]) for line in lines} == {("dense", "1/8", "1/4")}


def test_no_question_is_begun_when_the_time_is_over(
    subject_of: MakeSubject, capsys: pytest.CaptureFixture[str]
) -> None:
    subject = subject_of(max_context=800)
    retrieval(subject, {"1/8": subject.config}, ("passkey",), 2, -1.0)
    assert lines_of(capsys) == []


def test_a_text_is_predicted_under_every_budget(
    subject_of: MakeSubject, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    subject = subject_of()
    wide = dataclasses.replace(subject.config, token_budget="1/2")
    text_figures(subject, {"1/8": subject.config, "1/2": wide}, {"letters": text}, 8, 4)
    dense, narrow, half = lines_of(capsys)
    assert [line["budget"] for line in (dense, narrow, half)] == ["dense", "1/8", "1/2"]
    assert dense["mean_density"] == 1 > half["mean_density"] > narrow["mean_density"]
    assert dense["attention_mass"] is None and 0 < narrow["attention_mass"] < half["attention_mass"] < 1
    assert abs(half["nll"] - dense["nll"]) < abs(narrow["nll"] - dense["nll"])
