"""`eval retrieval`: facts hidden in a long context, asked for."""

from __future__ import annotations

import random
from functools import partial

from ds_offload.errors import InputError
from ds_offload.evaluation.answering import Question, answer_all
from ds_offload.evaluation.haystack import Counter, Haystack, shipped_filler
from ds_offload.evaluation.metrics import found_share
from ds_offload.evaluation.result import EvalResult
from ds_offload.evaluation.retrieval_cases import MAKERS, RetrievalCase
from ds_offload.evaluation.subject import EvalSubject
from ds_offload.prefill import ProgressCallback
from ds_offload.prompts import document_prompt

# Tokens of an answer: a five-digit number, or four names, and a sentence around it.
ANSWER_TOKENS = {"passkey": 24, "needles": 24, "key-value": 24, "tracing": 48}
DEFAULT_LIMIT = {"cuda": 25, "cpu": 1}
# Tokens of a question and a chat template.
QUESTION_TOKENS = 80
# What filler may not contain: an answer would not be the only one.
FOREIGN = ("pass key", "access code", "VAR ")


def parse_kinds(text: str) -> tuple[str, ...]:
    """Kinds of questions with commas between them.

    Raises:
        InputError: A kind that is not known, or none.
    """
    kinds = tuple(part.strip() for part in text.split(",") if part.strip())
    wrong = next((kind for kind in kinds if kind not in MAKERS), None)
    if wrong is not None or not kinds:
        what = "is empty" if wrong is None else f"names {wrong!r}, which is no kind of question"
        raise InputError(f"kinds={text!r} {what}; give some of {','.join(MAKERS)}")
    return kinds


def token_counter(subject: EvalSubject) -> Counter:
    """Counts the tokens of a text, without those that the tokenizer puts around every text."""
    tokenizer = subject.tokenizer
    around = len(tokenizer("")["input_ids"])
    return lambda text: len(tokenizer(text)["input_ids"]) - around


def make_case(
    subject: EvalSubject, kind: str, hay: Haystack, count: Counter, seed: int
) -> tuple[RetrievalCase, list[int]]:
    """A question as long as the context allows, its answer's room left, and its token ids.

    The same seed gives the same case for the same model, context and filler.

    Raises:
        InputError: The context is too short for this kind.
    """
    whole = subject.context - ANSWER_TOKENS[kind]
    # The parts' tokens add up to about the whole's: what is over is taken from the filler.
    room = whole - QUESTION_TOKENS
    while room > 0:
        case = MAKERS[kind](hay, room, count, random.Random(f"{kind} {seed}"))
        ids = subject.encode(document_prompt(case.context, case.question, subject.tokenizer))
        if len(ids) <= whole:
            return case, ids
        room -= len(ids) - whole
    raise InputError(f"--ctx {subject.context} is too short for a question of kind {kind}; give a longer context")


def eval_retrieval(
    subject: EvalSubject,
    kinds: tuple[str, ...] = tuple(MAKERS),
    filler: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    on_progress: ProgressCallback | None = None,
) -> EvalResult:
    """Share of the facts found, densely and sparsely, on the same cases.

    Args:
        kinds: Which kinds of questions, names of `MAKERS`.
        filler: The text to hide the facts in; None is the shipped document.
        limit: Questions of each kind; None is 25 on a GPU and 1 on a CPU.
        seed: Of the first question; the next has the next.

    Raises:
        InputError: The context is too short, or fits the budget.
    """
    limit = DEFAULT_LIMIT[subject.device.type] if limit is None else limit
    count = token_counter(subject)
    hay = Haystack(shipped_filler() if filler is None else filler, count, FOREIGN)
    questions = []
    for kind in kinds:
        for number in range(limit):
            case, ids = make_case(subject, kind, hay, count, seed + number)
            score = partial(found_share, expected=case.answers)
            questions.append(Question(kind, ids, ANSWER_TOKENS[kind], score, case.answers))
    options = {"kinds": list(kinds), "seed": seed, "limit": limit}
    return answer_all("retrieval", subject, questions, options, on_progress)
