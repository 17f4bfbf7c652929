"""LongBench's rows: read, asked, cut and scored; what is wrong in a file is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ds_offload import InputError
from ds_offload.evaluation.longbench import eval_longbench, read_longbench, row_ids, score_answer
from ds_offload.evaluation.longbench_sets import SETS
from ds_offload.evaluation.subject import EvalSubject

MakeSubject = Callable[..., EvalSubject]


def row_of(dataset: str = "hotpotqa", **changes: Any) -> dict[str, Any]:
    row = {
        "input": "Who?",
        "context": "word " * 300,
        "answers": ["Don Woods"],
        "length": 300,
        "dataset": dataset,
        "language": "en",
        "all_classes": None,
        "_id": "1",
    }
    return row | changes


def write(folder: Path, name: str, *rows: Any) -> None:
    (folder / name).write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")


def test_rows_are_read_in_the_order_of_files(tmp_path: Path) -> None:
    write(tmp_path, "hotpotqa_e.jsonl", row_of("hotpotqa_e"), row_of(input="b"), row_of(input="c"))
    write(tmp_path, "a.jsonl", row_of("trec", all_classes=["x", "y"]))
    rows = read_longbench(str(tmp_path), 2)
    assert [(row.dataset, row.input) for row in rows] == [("trec", "Who?"), ("hotpotqa", "Who?"), ("hotpotqa", "b")]
    assert rows[0].classes == ("x", "y")


def test_chinese_sets_are_left_out_with_a_notice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, "dureader.jsonl", row_of("dureader"))
    with pytest.raises(InputError, match="only Chinese"):
        read_longbench(str(tmp_path), 2)
    write(tmp_path, "hotpotqa.jsonl", row_of())
    assert [row.dataset for row in read_longbench(str(tmp_path), 2)] == ["hotpotqa"]
    assert "dureader.jsonl: left out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 1 is not JSON"),
        ("[1]", "lacks input, context, answers, dataset"),
        (json.dumps(row_of(answers="x")), "lacks answers"),
        (json.dumps(row_of(answers=[])), "lacks answers"),
        (json.dumps(row_of("squad")), "'squad', which is not known"),
        (json.dumps(row_of("trec")), "lacks all_classes"),
        ("", "is empty"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(line: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(line + "\n", encoding="utf-8")
    with pytest.raises(InputError, match=words):
        read_longbench(str(tmp_path), 1)


def test_only_the_first_line_counts_where_longbench_cuts_there(tmp_path: Path) -> None:
    write(tmp_path, "t.jsonl", row_of("triviaqa"))
    (row,) = read_longbench(str(tmp_path), 1)
    assert score_answer("\nDon Woods\nQuestion: and?", row, SETS["triviaqa"]) == 1
    assert score_answer("Don Woods\nQuestion: and?", row, SETS["hotpotqa"]) < 1


def test_a_long_context_loses_its_middle(tmp_path: Path, subject_of: MakeSubject) -> None:
    write(tmp_path, "h.jsonl", row_of(context="begin " + "word " * 3000 + "end"))
    (row,) = read_longbench(str(tmp_path), 1)
    subject = subject_of(max_context=1000)
    ids = row_ids(subject, row, SETS["hotpotqa"])
    assert 900 - 32 <= len(ids) <= 1000 - 32
    text = subject.tokenizer.decode(ids)
    assert text.startswith("begin word") and "word end" in text and "Question: Who?" in text
    with pytest.raises(InputError, match="do not fit"):
        row_ids(subject_of(max_context=80), row, SETS["hotpotqa"])


def test_sets_are_scored_by_their_own_metrics(tmp_path: Path, subject_of: MakeSubject) -> None:
    write(tmp_path, "h.jsonl", row_of(), row_of("passage_count", answers=["3"]))
    rows = read_longbench(str(tmp_path), 5)
    result = eval_longbench(subject_of(max_context=800), rows, 5)
    assert result.sparse["cases"] == 2
    assert result.sparse.keys() == {"score", "cases", "hotpotqa", "passage_count", "answers"}
