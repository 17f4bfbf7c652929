"""MMLU's csv files, its prompts, and the letter's likelihood against transformers'."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from ds_offload import InputError
from ds_offload.evaluation.mmlu import (
    LETTERS,
    choose_questions,
    eval_mmlu,
    letter_ids,
    question_ids,
    read_mmlu,
    read_questions,
)
from ds_offload.evaluation.subject import EvalSubject

MakeSubject = Callable[..., EvalSubject]
ROWS = 'What is 1+1?,1,2,3,4,B\n"Is this, quoted, a question?",yes,no,"may, be",never,A\nThird?,a,b,c,d,D\n'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for part in ("test", "dev"):
        (tmp_path / part).mkdir()
        (tmp_path / part / f"high_school_maths_{part}.csv").write_text(ROWS, encoding="utf-8")
    (tmp_path / "test" / "law_test.csv").write_text("question,A,B,C,D,answer\n" + ROWS, encoding="utf-8")
    return tmp_path


def test_subjects_and_shots_are_read(folder: Path) -> None:
    maths, law = read_mmlu(str(folder))
    assert (maths.name, len(maths.shots), len(maths.questions)) == ("high_school_maths", 3, 3)
    assert (law.name, len(law.shots), len(law.questions)) == ("law", 0, 3)
    assert law.questions[1].choices == ("yes", "no", "may, be", "never")
    assert maths.questions[0].text(answered=True) == "What is 1+1?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: B\n\n"
    assert [topic.name for topic, _ in choose_questions([maths, law], 3)] == [
        "high_school_maths",
        "law",
        "high_school_maths",
    ]


@pytest.mark.parametrize(
    ("content", "words"),
    [("", "no question"), ("q,1,2,3,A\n", "has 5 columns"), ("q,1,2,3,4,E\n", "the answer 'E'")],
)
def test_wrong_columns_are_named(content: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "x_test.csv"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=words):
        read_questions(path, "x")


def test_folders_without_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no file \*_test.csv"):
        read_mmlu(str(tmp_path))
    with pytest.raises(InputError, match="is no folder"):
        read_mmlu(str(tmp_path / "nothing"))


def test_shots_that_do_not_fit_are_left_out(folder: Path, subject_of: MakeSubject) -> None:
    maths = read_mmlu(str(folder))[0]
    whole, cut = (question_ids(subject_of(max_context=tokens), maths, maths.questions[0]) for tokens in (1024, 220))
    assert len(cut) <= 220 < len(whole)
    with pytest.raises(InputError, match="raise --ctx"):
        question_ids(subject_of(max_context=64), maths, maths.questions[0])


def test_the_dense_letter_is_transformers_letter(folder: Path, tiny_folder: Path, subject_of: MakeSubject) -> None:
    topics, subject = read_mmlu(str(folder)), subject_of(max_context=1024)
    model = AutoModelForCausalLM.from_pretrained(tiny_folder).eval()
    expected = []
    for topic, question in choose_questions(topics, 6):
        with torch.no_grad():
            logits = model(torch.tensor([question_ids(subject, topic, question)])).logits[0, -1]
        expected.append(LETTERS[int(logits[letter_ids(subject)].argmax())])
    result = eval_mmlu(subject, topics, 6)
    assert [row["answer"] for row in result.dense["answers"]] == expected
    right = [row["answer"] == row["expected"] for row in result.dense["answers"]]
    assert result.dense["score"] == sum(right) / 6
    assert result.sparse["cases"] == 6
    assert result.density is not None and 0 < result.density < 0.5


def test_prompts_within_the_budget_are_refused(folder: Path, subject_of: MakeSubject) -> None:
    with pytest.raises(InputError, match="keeps all of every prompt"):
        eval_mmlu(subject_of(max_context=1024, token_budget=1000), read_mmlu(str(folder)), 2)
