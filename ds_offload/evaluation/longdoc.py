"""`eval longdoc`: questions and summaries over whole documents, scored by SQuAD's F1 and ROUGE-L."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from ds_offload.errors import InputError
from ds_offload.evaluation.answering import Question, answer_all
from ds_offload.evaluation.longdoc_cases import CASES, LongdocCase
from ds_offload.evaluation.metrics import Metric, check_rouge, f1_score, rouge_l
from ds_offload.evaluation.result import EvalResult
from ds_offload.evaluation.subject import EvalSubject
from ds_offload.prefill import ProgressCallback
from ds_offload.prompts import document_prompt

METRICS: dict[str, Metric] = {"question": f1_score, "summary": rouge_l}
ANSWER_TOKENS = {"question": 24, "summary": 160}
DEFAULT_LIMIT = {"cuda": len(CASES), "cpu": 3}


def best_score(given: str, answers: Sequence[str], metric: Metric, classes: Sequence[str] = ()) -> float:
    """The best score over all acceptable answers."""
    return max(metric(given, expected, classes) for expected in answers)


def choose_cases(tasks: Sequence[str], limit: int) -> list[LongdocCase]:
    """The first `limit` cases, the tasks taking turns, so that a few cases are of each."""
    queues = [[case for case in CASES if case.task == task] for task in tasks]
    chosen: list[LongdocCase] = []
    while len(chosen) < limit and any(queues):
        for queue in queues:
            if queue and len(chosen) < limit:
                chosen.append(queue.pop(0))
    return chosen


def parse_tasks(text: str) -> tuple[str, ...]:
    """Tasks with commas between them.

    Raises:
        InputError: A task that is not known, none, or ROUGE is needed and missing.
    """
    tasks = tuple(part.strip() for part in text.split(",") if part.strip())
    wrong = next((task for task in tasks if task not in METRICS), None)
    if wrong is not None or not tasks:
        what = "is empty" if wrong is None else f"names {wrong!r}, which is no task"
        raise InputError(f"tasks={text!r} {what}; give some of {','.join(METRICS)}")
    if "summary" in tasks:
        check_rouge()
    return tasks


def eval_longdoc(
    subject: EvalSubject,
    tasks: Sequence[str] = tuple(METRICS),
    limit: int | None = None,
    on_progress: ProgressCallback | None = None,
) -> EvalResult:
    """F1 of answers and ROUGE-L of summaries, densely and sparsely.

    Args:
        tasks: "question", "summary" or both.
        limit: Most cases in all; None is all of them on a GPU and three on a CPU.

    Raises:
        InputError: A document is longer than the context, or ROUGE is needed and missing.
    """
    if "summary" in tasks:
        check_rouge()
    limit = DEFAULT_LIMIT[subject.device.type] if limit is None else limit
    questions = []
    for case in choose_cases(tasks, limit):
        ids = subject.encode(document_prompt(case.text(), case.prompt, subject.tokenizer))
        needed = len(ids) + ANSWER_TOKENS[case.task]
        if needed > subject.context:
            raise InputError(
                f"{case.document} with its question and answer has {needed:,} tokens, and the context "
                f"{subject.context:,}; "
                f"give --ctx {needed} or more"
            )
        score = partial(best_score, answers=case.answers, metric=METRICS[case.task])
        questions.append(Question(case.task, ids, ANSWER_TOKENS[case.task], score, case.answers))
    return answer_all("longdoc", subject, questions, {"tasks": list(tasks), "limit": limit}, on_progress)
