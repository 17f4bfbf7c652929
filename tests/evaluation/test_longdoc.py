"""Questions over the shipped documents: their answers stand there, and both ways of decoding are scored."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ds_offload import InputError
from ds_offload.evaluation.longdoc import choose_cases, eval_longdoc, parse_tasks
from ds_offload.evaluation.longdoc_cases import CASES, LongdocCase
from ds_offload.evaluation.metrics import f1_score
from ds_offload.evaluation.subject import EvalSubject

MakeSubject = Callable[..., EvalSubject]


@pytest.mark.parametrize("case", [case for case in CASES if case.task == "question"], ids=lambda case: case.prompt)
def test_an_answer_stands_verbatim_in_its_document(case: LongdocCase) -> None:
    text = case.text()
    for answer in case.answers:
        assert answer in text
        assert f1_score(answer, answer) == 1
        assert answer not in case.prompt


def test_reference_summaries_are_short_and_of_the_documents_words() -> None:
    for case in (case for case in CASES if case.task == "summary"):
        (summary,) = case.answers
        assert 40 < len(summary.split()) < 120
        assert "1975" in summary and "1975" in case.text()


def test_tasks_take_turns() -> None:
    assert [case.task for case in choose_cases(("question", "summary"), 3)] == ["question", "summary", "question"]
    assert len(choose_cases(("question", "summary"), 1000)) == len(CASES)
    assert {case.task for case in choose_cases(("summary",), 1000)} == {"summary"}


def test_tasks_are_read() -> None:
    assert parse_tasks("question") == ("question",)
    with pytest.raises(InputError, match="names 'questions'"):
        parse_tasks("questions")


def test_a_document_longer_than_the_context_names_the_context_it_needs(subject_of: MakeSubject) -> None:
    with pytest.raises(InputError, match=r"jargon_file.txt .* give --ctx \d+ or more"):
        eval_longdoc(subject_of(), ("question",), 1)


@pytest.mark.slow
def test_the_default_model_answers_a_question(smollm2: object, monkeypatch: pytest.MonkeyPatch) -> None:
    from ds_offload import OffloadConfig
    from ds_offload.evaluation.subject import prepare

    monkeypatch.delenv("DS_OFFLOAD_CACHE")
    model = {"name": "smollm2-135m", "load_format": "auto", "device": "cpu", "dtype": "auto", "rope_scaling": None}
    with EvalSubject(prepare(model, OffloadConfig(), 4096)) as subject:
        result = eval_longdoc(subject, ("question",), 1)
    assert result.dense["cases"] == 1 and 0 <= result.dense["score"] <= 1
    assert result.density is not None and 1 / 16 < result.density < 1 / 15
