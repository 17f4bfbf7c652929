"""`eval mmlu`: multiple choice from the csv files of MMLU, by the likelihood of the letter."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_offload.errors import InputError
from ds_offload.evaluation.longbench import data_files
from ds_offload.evaluation.result import EvalResult, counted, mean
from ds_offload.evaluation.subject import EvalSubject, announce_window, dense_twin, is_sparse
from ds_offload.evaluation.teacher_forcing import teacher_force
from ds_offload.notices import notice
from ds_offload.prefill import ProgressCallback

LETTERS = ("A", "B", "C", "D")
COLUMNS = ("question", *LETTERS, "answer")
SHOTS = 5
# Last tokens of the prompt that are decoded: the answer's letter must not come from the dense prompt.
STEPS = 8
DEFAULT_LIMIT = {"cuda": 200, "cpu": 2}


@dataclass(frozen=True)
class MmluQuestion:
    """A question, its four choices and the letter of the right one."""

    subject: str
    question: str
    choices: tuple[str, ...]
    answer: str

    def text(self, answered: bool) -> str:
        """As it stands in a prompt, with its answer or without."""
        choices = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, self.choices, strict=True))
        return f"{self.question}\n{choices}\nAnswer:" + (f" {self.answer}\n\n" if answered else "")


@dataclass(frozen=True)
class MmluSubject:
    """A subject's questions, and up to five answered ones that stand in front of each."""

    name: str
    shots: tuple[MmluQuestion, ...]
    questions: tuple[MmluQuestion, ...]

    @property
    def heading(self) -> str:
        """The prompt's first line."""
        about = self.name.replace("_", " ")
        return f"The following are multiple choice questions (with answers) about {about}.\n\n"


def read_mmlu(folder: str) -> list[MmluSubject]:
    """The subjects in `folder`: `NAME_test.csv` (or `test/NAME_test.csv`), shots from `NAME_dev.csv` in the same way.

    Columns are question, A, B, C, D and answer, without a heading or with exactly these.

    Raises:
        InputError: No such folder, no test file in it, or wrong columns.
    """
    root = Path(os.path.expanduser(folder))
    inner = root / "test" if (root / "test").is_dir() else root
    subjects = []
    for path in data_files(str(inner), "*_test.csv", "MMLU's csv files"):
        name = path.name.removesuffix("_test.csv")
        places = (root / "dev" / f"{name}_dev.csv", path.with_name(f"{name}_dev.csv"))
        dev = next((place for place in places if place.is_file()), None)
        shots = read_questions(dev, name)[:SHOTS] if dev is not None else []
        subjects.append(MmluSubject(name, tuple(shots), tuple(read_questions(path, name))))
    return subjects


def read_questions(path: Path, subject: str) -> list[MmluQuestion]:
    """The questions of one csv file.

    Raises:
        InputError: Empty, or a row without the six columns or with an answer that is no letter from A to D.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = [row for row in csv.reader(file) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as csv ({error}); give MMLU's csv files") from None
    if rows and tuple(rows[0]) == COLUMNS:
        rows = rows[1:]
    if not rows:
        raise InputError(f"{path} has no question; give MMLU's csv files")
    for number, row in enumerate(rows, 1):
        if len(row) != len(COLUMNS) or row[-1].strip() not in LETTERS:
            raise InputError(
                f"{path} row {number} has {len(row)} columns and the answer {row[-1][:20]!r}; "
                f"a row has {len(COLUMNS)}: {', '.join(COLUMNS)}, the answer A, B, C or D"
            )
    return [MmluQuestion(subject, row[0], tuple(row[1:5]), row[5].strip()) for row in rows]


def question_ids(subject: EvalSubject, topic: MmluSubject, question: MmluQuestion) -> list[int]:
    """Token ids of a prompt: as many shots as fit, then the question.

    Raises:
        InputError: The question alone does not fit.
    """
    for first in range(len(topic.shots) + 1):
        shots = "".join(shot.text(answered=True) for shot in topic.shots[first:])
        ids = subject.encode(topic.heading + shots + question.text(answered=False))
        if len(ids) <= subject.context:
            return ids
    raise InputError(
        f"a question of {topic.name} has {len(ids):,} tokens, more than the context of {subject.context:,}; raise --ctx"
    )


def letter_ids(subject: EvalSubject) -> list[int]:
    """The token of each letter behind "Answer:"."""
    return [subject.encode(f"Answer: {letter}")[-1] for letter in LETTERS]


def eval_mmlu(
    subject: EvalSubject, topics: Sequence[MmluSubject], limit: int, on_progress: ProgressCallback | None = None
) -> EvalResult:
    """Share of questions whose right letter is the likeliest of the four, densely and sparsely.

    The last eight tokens of a prompt are decoded. Prompts that fit the budget are left out.

    Args:
        limit: Most questions in all; subjects take turns.

    Raises:
        InputError: A question does not fit the context, or all of them fit the budget.
    """
    chosen = choose_questions(topics, limit)
    prompts = [(question, question_ids(subject, topic, question)) for topic, question in chosen]
    asked = [(question, ids) for question, ids in prompts if is_sparse(subject.config, len(ids) - STEPS + 1)]
    if not asked:
        raise InputError(
            f"token_budget={subject.config.token_budget} keeps all of every prompt (the longest has "
            f"{max(len(ids) for _, ids in prompts):,} tokens), so nothing sparse"
            " would be measured; lower --token-budget"
        )
    if len(asked) < len(prompts):
        notice(f"{len(prompts) - len(asked)} of {len(prompts)} prompts fit the budget and are left out")
    longest = max(len(ids) for _, ids in asked)
    subject.check_memory(longest - STEPS, longest)
    announce_window(subject.config, longest)
    letters = torch.tensor(letter_ids(subject))
    rows: dict[str, list[dict[str, Any]]] = {"dense": [], "sparse": []}
    densities = []
    for question, ids in counted(asked, len(asked), "questions"):
        for which, config in (("dense", dense_twin(subject.config)), ("sparse", subject.config)):
            last: list[Tensor] = []

            def visit(number: int, logits: Tensor, last: list[Tensor] = last) -> None:
                if number == STEPS - 1:
                    last.append(logits[letters.to(logits.device)].cpu())

            figures = teacher_force(subject, config, ids, STEPS, visit, on_progress)
            given = LETTERS[int(last[0].argmax())]
            rows[which].append(
                {"subject": question.subject, "expected": question.answer, "answer": given}
                | {"score": float(given == question.answer)}
            )
        densities.append(figures.density)
    dense, sparse = (
        {"score": mean([row["score"] for row in rows[which]]), "cases": len(asked), "answers": rows[which]}
        for which in ("dense", "sparse")
    )
    model, options = subject.name, {"ctx": subject.context, "limit": limit, "shots": SHOTS}
    return EvalResult("mmlu", model, subject.config, "score", dense, sparse, mean(densities), options)


def choose_questions(topics: Sequence[MmluSubject], limit: int) -> list[tuple[MmluSubject, MmluQuestion]]:
    """The first `limit` questions, the subjects taking turns."""
    turns = max(len(topic.questions) for topic in topics)
    every = [(topic, topic.questions[turn]) for turn in range(turns) for topic in topics if turn < len(topic.questions)]
    return every[:limit]
