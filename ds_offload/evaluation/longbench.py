"""`eval longbench`: rows of LongBench's own JSONL files, its metrics, from a local folder."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ds_offload.errors import InputError
from ds_offload.evaluation.answering import Question, answer_all
from ds_offload.evaluation.longbench_sets import CHINESE, SETS, LongBenchSet
from ds_offload.evaluation.longdoc import best_score
from ds_offload.evaluation.metrics import check_rouge, rouge_l
from ds_offload.evaluation.result import EvalResult
from ds_offload.evaluation.subject import EvalSubject
from ds_offload.notices import notice
from ds_offload.prefill import ProgressCallback
from ds_offload.prompts import has_chat_template

COLUMNS = {"input": str, "context": str, "answers": list, "dataset": str}
DEFAULT_LIMIT = {"cuda": 50, "cpu": 1}


@dataclass(frozen=True)
class LongBenchRow:
    """One row of a file.

    Attributes:
        dataset: Its data set, a name of `SETS`.
        context, input: The text and the question.
        answers: Acceptable answers.
        classes: All class names, of a classification.
    """

    dataset: str
    context: str
    input: str
    answers: tuple[str, ...]
    classes: tuple[str, ...]


def read_longbench(folder: str, limit: int) -> list[LongBenchRow]:
    """The first `limit` rows of every `.jsonl` file in `folder`, files in the order of their names.

    Raises:
        InputError: No such folder, no file in it, a line that is no row of LongBench's, or
            nothing but Chinese data sets.
    """
    rows = []
    for path in data_files(folder, "*.jsonl", "LongBench's .jsonl files"):
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path} cannot be read as UTF-8 text ({error}); give LongBench's .jsonl files") from None
        # Not splitlines: a context may have other line separators of Unicode within a row.
        numbered = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        if not numbered:
            raise InputError(f"{path} is empty; give LongBench's .jsonl files")
        read = [_read_row(path, number, line) for number, line in numbered[:limit]]
        chinese = [row for row in read if row.dataset in CHINESE]
        if chinese:
            notice(f"{path.name}: left out, {chinese[0].dataset} needs a Chinese word segmenter")
        rows += [row for row in read if row.dataset not in CHINESE]
    if not rows:
        raise InputError(f"{folder} has only Chinese data sets, which are not scored; give one of {', '.join(SETS)}")
    return rows


def data_files(folder: str, pattern: str, what: str) -> list[Path]:
    """The files of a folder that fit `pattern`, by name.

    Raises:
        InputError: It is no folder, or has none.
    """
    root = Path(os.path.expanduser(folder))
    if not root.is_dir():
        raise InputError(f"--data {folder!r} is no folder; give the folder of {what}")
    files = sorted(root.glob(pattern))
    if not files:
        raise InputError(f"--data {folder!r} has no file {pattern}; give the folder of {what}")
    return files


def _read_row(path: Path, number: int, line: str) -> LongBenchRow:
    where = f"{path} line {number}"
    try:
        row: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where} is not JSON ({error.msg}); give LongBench's .jsonl files") from None
    wrong = [name for name, kind in COLUMNS.items() if not isinstance(row, dict) or not isinstance(row.get(name), kind)]
    if wrong or not row["answers"]:
        names = ", ".join(wrong or ["answers"])
        raise InputError(f"{where} lacks {names}; a row has {', '.join(COLUMNS)}, all_classes and length")
    dataset = row["dataset"].removesuffix("_e")
    if dataset not in SETS and dataset not in CHINESE:
        raise InputError(f"{where} is of the data set {row['dataset']!r}, which is not known; known: {', '.join(SETS)}")
    classes = tuple(str(name) for name in row.get("all_classes") or ())
    if SETS.get(dataset) is SETS["trec"] and not classes:
        raise InputError(f"{where} lacks all_classes, which {dataset} is scored with")
    return LongBenchRow(dataset, row["context"], row["input"], tuple(map(str, row["answers"])), classes)


def row_ids(subject: EvalSubject, row: LongBenchRow, asked: LongBenchSet) -> list[int]:
    """Token ids of a row's prompt; a context that is too long loses its middle, as in LongBench.

    Raises:
        InputError: The question alone does not fit.
    """
    tokenizer, room = subject.tokenizer, subject.context - asked.max_new_tokens
    chat = asked.chat and has_chat_template(tokenizer)
    task = asked.task.replace("{input}", row.input)
    between = "\n\n" if asked.chat else "\n" if row.dataset in ("trec", "triviaqa", "samsum") else ""

    def build(context: str) -> list[int]:
        prompt = f"{context}{between}{task}"
        return subject.encode([{"role": "user", "content": prompt}] if chat else prompt)

    ids = build(row.context)
    if len(ids) <= room:
        return ids
    tokens = list(tokenizer(row.context)["input_ids"])
    kept = len(tokens)
    while len(ids) > room:
        # Tokens at the seam may fall apart in another way, so that one turn may not be enough.
        kept -= len(ids) - room
        if kept < 2:
            raise InputError(
                f"the question of a row of {row.dataset} and its answer do not fit into {subject.context:,} tokens; "
                "raise --ctx"
            )
        halves = tokens[: kept // 2], tokens[len(tokens) - kept // 2 :]
        ids = build("".join(tokenizer.decode(half, skip_special_tokens=True) for half in halves))
    return ids


def score_answer(given: str, row: LongBenchRow, asked: LongBenchSet) -> float:
    """The best score of the answer over all acceptable ones."""
    if asked.first_line:
        given = given.lstrip("\n").split("\n")[0]
    return best_score(given, row.answers, asked.metric, row.classes)


def eval_longbench(
    subject: EvalSubject,
    rows: Sequence[LongBenchRow],
    limit: int,
    on_progress: ProgressCallback | None = None,
) -> EvalResult:
    """Score rows densely and sparsely, each data set by its own metric.

    The prompts are this project's own words for LongBench's tasks.

    Raises:
        InputError: A question does not fit the context, or ROUGE is needed and missing.
    """
    if any(SETS[row.dataset].metric is rouge_l for row in rows):
        check_rouge()
    questions = []
    for row in rows:
        asked = SETS[row.dataset]
        score = partial(score_answer, row=row, asked=asked)
        questions.append(Question(row.dataset, row_ids(subject, row, asked), asked.max_new_tokens, score, row.answers))
    return answer_all("longbench", subject, questions, {"limit": limit}, on_progress)
