"""`ds-offload eval`: one JSON object with the agreed names, and one line for every wrong input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

WINDOW = ("--sink-tokens", "2", "--recent-tokens", "4")
SMALL = (*WINDOW, "--token-budget", "1/8", "--device", "cpu")
ROW = {"input": "Who?", "context": "word " * 60, "answers": ["me"], "length": 60, "dataset": "hotpotqa"}

Command = Callable[..., Any]


@pytest.fixture
def text_file(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"Line {number} says {number * number}.\n" for number in range(40)), encoding="utf-8")
    return str(path)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "hotpotqa.jsonl").write_text(json.dumps(ROW), encoding="utf-8")
    (folder / "law_test.csv").write_text("What is it?,one,two,three,four,B\n", encoding="utf-8")
    return folder


def check(ended: Any, measure: str) -> dict[str, Any]:
    """The agreed names, and nothing but JSON on stdout."""
    assert ended.status == 0, ended.err
    result = json.loads(ended.out)
    assert {"dense", "sparse", "delta", "mean_density", "config", "task", "model", "ctx"} <= result.keys()
    for which in ("dense", "sparse"):
        assert isinstance(result[which][measure], float)
        if measure == "score":
            assert isinstance(result[which]["cases"], int)
    assert result["delta"] == result["sparse"][measure] - result["dense"][measure]
    assert result["config"]["token_budget"] == "1/8"
    line = next(line for line in ended.error_lines if "mean density" in line)
    assert all(words in line for words in ("budget", "bytes a token", "K/V", "prefetch"))
    return result


@pytest.mark.parametrize("task", ["ppl", "agreement"])
def test_texts(task: str, command: Command, plain_model: str, text_file: str) -> None:
    options = ("--text", text_file, "--ctx", "200", "--positions", "6", "--limit", "2")
    result = check(command("eval", task, "--model", plain_model, *SMALL, *options, "--json"), "nll")
    assert (result["positions"], result["texts"], result["ctx"]) == (6, ["text.txt"], 200)
    if task == "agreement":
        assert {"top1_match", "kl", "attention_mass", "output_error", "layers"} <= result["sparse"].keys()
        assert len(result["sparse"]["layers"]["attention_mass"]) == 3


def test_without_json_there_is_a_table(command: Command, plain_model: str, text_file: str) -> None:
    options = ("--text", text_file, "--ctx", "200", "--positions", "6")
    ended = command("eval", "ppl", "--model", plain_model, *SMALL, *options)
    assert ended.status == 0, ended.err
    heading, nll, *_ = ended.out.splitlines()
    assert heading.split() == ["ppl", "dense", "sparse", "delta"]
    assert nll.split()[0] == "nll" and len(nll.split()) == 4


def test_retrieval(command: Command, plain_model: str, text_file: str) -> None:
    options = ("--ctx", "512", "--kinds", "passkey", "--limit", "2", "--seed", "3", "--text", text_file)
    result = check(command("eval", "retrieval", "--model", plain_model, *SMALL, *options, "--json"), "score")
    assert result["dense"]["cases"] == 2
    assert (result["kinds"], result["seed"]) == (["passkey"], 3)


def test_longbench_and_mmlu(command: Command, plain_model: str, data: Path) -> None:
    for task in ("longbench", "mmlu"):
        options = ("--ctx", "512", "--data", str(data))
        result = check(command("eval", task, "--model", plain_model, *SMALL, *options, "--json"), "score")
        assert result["dense"]["cases"] == 1


def test_longdoc_needs_a_model_with_room(refused: Command, plain_model: str) -> None:
    ended = refused("eval", "longdoc", "--model", plain_model, *SMALL, "--tasks", "question")
    assert "jargon_file.txt" in ended.err and "--ctx" in ended.err


def test_sweep(command: Command, plain_model: str, text_file: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "sweep.svg"
    options = ("--text", text_file, "--ctx", "200", "--positions", "4", "--plot", str(picture), "--device", "cpu")
    grid = ("--budgets", "1/8", "--labels", "2,4x8", "--modes", "off")
    result = check(command("eval", "sweep", "--model", plain_model, *WINDOW, *options, *grid, "--json"), "nll")
    assert [(row["label_channels"], row["label_bits"]) for row in result["rows"]] == [(12, 2), (4, 8)]
    assert {"delta", "mean_density", "h2d_bytes_per_token", "label_bytes"} <= result["rows"][0].keys()
    assert picture.read_bytes().startswith(b"<?xml")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("ppl",), "no text was given"),
        (("ppl", "--text", "missing.txt"), "'missing.txt' does not exist"),
        (("ppl", "--text", "TEXT", "--ctx", "512", "--positions", "0"), "positions='0'"),
        (("ppl", "--text", "TEXT", "--ctx", "512", "--limit", "many"), "limit='many'"),
        (("ppl", "--text", "SHORT", "--ctx", "512"), "short.txt has 5 tokens, and --ctx is 512"),
        (("ppl", "--text", "TEXT", "--ctx", "256", "--token-budget", "1/1"), "keeps all of a context"),
        (("agreement", "--text", "TEXT", "--ctx", "256", "--token-budget", "9/8"), "token_budget='9/8'"),
        (("retrieval", "--kinds", "needle"), "'needle', which is no kind"),
        (("retrieval", "--ctx", "64"), "too short for a question"),
        (("retrieval", "--seed", "x"), "seed='x'"),
        (("longdoc", "--tasks", "song"), "'song', which is no task"),
        (("longbench", "--data", "missing"), "'missing' is no folder"),
        (("longbench", "--data", "EMPTY"), "has no file *.jsonl"),
        (("longbench",), "--data"),
        (("mmlu", "--data", "EMPTY"), "has no file *_test.csv"),
        (("sweep", "--text", "TEXT", "--labels", "3"), "labels='3'"),
        (("sweep", "--text", "TEXT", "--plot", "x.txt"), "is no picture"),
        (
            ("sweep", "--text", "TEXT", "--token-budget", "1/4"),
            "--token-budget is of one run, and a sweep goes by --bu",
        ),
        (("sweep", "--text", "TEXT", "--label-bits", "4"), "a sweep goes by --labels; give it there"),
        (("sweep", "--text", "TEXT", "--prefetch", "exact"), "a sweep goes by --modes; give it there"),
        (("ppl", "--text", "TEXT", "--monitor", "widen"), "--monitor widen has no effect here"),
        (("retrieval", "--monitor-every", "8"), "--monitor-every has no effect here"),
        (("surprise",), "surprise"),
    ],
)
def test_wrong_inputs_end_in_one_line(
    arguments: tuple[str, ...], words: str, refused: Command, plain_model: str, text_file: str, tmp_path: Path
) -> None:
    short, empty = tmp_path / "short.txt", tmp_path / "empty"
    short.write_text("short", encoding="utf-8")
    empty.mkdir()
    places = {"TEXT": text_file, "SHORT": str(short), "EMPTY": str(empty)}
    given = [places.get(argument, argument) for argument in arguments]
    model = () if arguments[0] == "surprise" else ("--model", plain_model, "--device", "cpu")
    assert words in refused("eval", *given, *model).err


def test_a_model_without_a_tokenizer_is_refused(refused: Command, ids_model: str, text_file: str) -> None:
    ended = refused("eval", "ppl", "--model", ids_model, "--text", text_file, "--ctx", "200", "--device", "cpu")
    assert "has no tokenizer" in ended.err


def test_the_group_lists_its_tasks(command: Command) -> None:
    ended = command("eval")
    assert ended.status == 0
    assert all(task in ended.out for task in ("ppl", "retrieval", "longdoc", "agreement", "longbench", "mmlu", "sweep"))
