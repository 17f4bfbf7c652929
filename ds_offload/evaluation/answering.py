"""Prompts answered greedily, densely and sparsely, each answer scored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ds_offload.errors import InputError
from ds_offload.evaluation.read_once import ReadOnce
from ds_offload.evaluation.result import EvalResult, counted, mean
from ds_offload.evaluation.subject import EvalSubject, announce_window, is_sparse
from ds_offload.generation import GenerationOutput
from ds_offload.notices import notice
from ds_offload.prefill import ProgressCallback


@dataclass(frozen=True)
class Question:
    """A prompt and how its answer is scored.

    Attributes:
        group: What it is averaged with, such as its kind or data set.
        ids: Token ids of the prompt.
        max_new_tokens: Most tokens of the answer.
        score: From the answer's text to 0 to 1.
        expected: What a right answer says, for the report.
    """

    group: str
    ids: list[int]
    max_new_tokens: int
    score: Callable[[str], float]
    expected: Sequence[str] = field(default=())


def answer_all(
    task: str,
    subject: EvalSubject,
    questions: Sequence[Question],
    options: dict[str, Any],
    on_progress: ProgressCallback | None = None,
) -> EvalResult:
    """Answer every question densely and sparsely.

    Questions whose whole context fits the budget are left out: their two answers are one.

    Raises:
        InputError: No question is left.
        MemoryPlanError: The longest context does not fit.
    """
    asked = [question for question in questions if is_sparse(subject.config, len(question.ids) + 1)]
    if not asked:
        raise InputError(
            f"token_budget={subject.config.token_budget} keeps all of every one of the {len(questions)} contexts, so "
            "nothing sparse would be measured; lower --token-budget or give a longer context with --ctx"
        )
    if len(asked) < len(questions):
        notice(f"{len(questions) - len(asked)} of {len(questions)} contexts fit the budget and are left out")
    longest = max(len(question.ids) for question in asked)
    capacity = min(subject.context, max(len(question.ids) + question.max_new_tokens for question in asked))
    subject.check_memory(longest, capacity)
    announce_window(subject.config, longest)
    dense: list[dict[str, Any]] = []
    sparse: list[dict[str, Any]] = []
    densities = []
    with ReadOnce(subject, longest, capacity) as prompts:
        for question in counted(asked, len(asked), "questions"):
            outputs = prompts.answer(question.ids, question.max_new_tokens, on_progress)
            for rows, out in zip((dense, sparse), outputs, strict=True):
                rows.append(_row(question, out))
            if outputs[1].stats["mean_density"] is not None:
                densities.append(outputs[1].stats["mean_density"])
    density = mean(densities) if densities else None
    if density is None:
        notice("every answer ended with its first token, which the dense prompt gives: nothing sparse was measured")
    model = subject.name
    options = {"ctx": subject.context, **options}
    return EvalResult(task, model, subject.config, "score", _figures(dense), _figures(sparse), density, options)


def _row(question: Question, out: GenerationOutput) -> dict[str, Any]:
    """An answer and its score."""
    return {
        "group": question.group,
        "prompt_tokens": len(question.ids),
        "new_tokens": len(out.token_ids),
        "expected": list(question.expected),
        "answer": out.text,
        "score": question.score(out.text),
    }


def _figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean over all answers, over each group, and the answers."""
    groups = dict.fromkeys(row["group"] for row in rows)
    figures: dict[str, Any] = {"score": mean([row["score"] for row in rows]), "cases": len(rows)}
    if len(groups) > 1:
        figures |= {name: mean([row["score"] for row in rows if row["group"] == name]) for name in groups}
    return figures | {"answers": rows}
