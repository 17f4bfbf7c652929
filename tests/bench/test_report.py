"""A report as JSON, as a table and as a picture."""

from __future__ import annotations

import importlib.util
import io
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from ds_offload.bench.environment import Environment, tree_commit
from ds_offload.bench.limits import Limits
from ds_offload.bench.report import BenchRow, Report, check_plot
from ds_offload.bench.timing import Timing
from ds_offload.errors import InputError

TIMING = Timing(median=0.002, p20=0.001, p80=0.004)


def report(*rows: BenchRow) -> Report:
    environment = Environment("some device", {"torch": "9.9", "driver": None}, "abc-dirty")
    return Report("gather", environment, Limits(1e9, 2e9, 3e9), {"ctx": 5}, list(rows), ["one was left out"])


def test_a_row_is_in_its_unit_and_its_ratio_has_none() -> None:
    row = BenchRow.of("a row", TIMING, "us", 0.0005, hit_rate=0.5, bytes=7)
    assert row.to_dict() == {
        "name": "a row",
        "median": pytest.approx(2000),
        "p20": pytest.approx(1000),
        "p80": pytest.approx(4000),
        "unit": "us",
        "limit": pytest.approx(500),
        "ratio": pytest.approx(4),
        "hit_rate": 0.5,
        "bytes": 7,
    }
    assert BenchRow.of("a row", TIMING, "ms", 0.0005).ratio == row.ratio


@pytest.mark.parametrize("limit", [None, 0.0])
def test_without_a_limit_there_is_no_ratio(limit: float | None) -> None:
    assert BenchRow.of("a row", TIMING, "ms", limit).to_dict()["ratio"] is None


def test_the_json_object_holds_what_the_figures_depend_on() -> None:
    result = json.loads(json.dumps(report(BenchRow.of("a row", TIMING, "ms")).to_dict()))
    assert list(result) == ["bench", "device", "versions", "commit", "options", "limits", "notes", "rows"]
    assert (result["device"], result["commit"]) == ("some device", "abc-dirty")
    assert result["versions"] == {"torch": "9.9", "driver": None}
    assert result["limits"]["read_bytes_per_s"] == 2e9
    assert result["notes"] == ["one was left out"]


def test_the_table_shows_every_figure_of_every_row() -> None:
    stream = io.StringIO()
    rows = (
        BenchRow.of("one", TIMING, "ms", 0.001, hits=0.25),
        BenchRow.of("two", TIMING, "ms", computed=True, rows=7000),
    )
    report(*rows).print_table(Console(file=stream, width=200))
    text = stream.getvalue()
    assert all(word in text for word in ("hits", "computed", "0.25", "yes", "7,000", "some device", "one was left out"))


def test_the_picture_is_saved(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "rows.png"
    report(BenchRow.of("one", TIMING, "ms", 0.001), BenchRow.of("two", TIMING, "ms")).save_plot(str(path))
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_picture_that_could_not_be_saved_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"ends in one of \.png"):
        check_plot("rows.txt")
    with pytest.raises(InputError, match="no folder"):
        check_plot(str(tmp_path / "missing" / "rows.png"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install matplotlib"):
        check_plot(str(tmp_path / "rows.png"))


def test_the_environment_names_device_and_versions() -> None:
    environment = Environment.of(torch.device("cpu"))
    assert environment.device.startswith("cpu (") and "threads" in environment.device
    assert set(environment.versions) == {"python", "ds_offload", "torch", "triton", "transformers", "cuda", "driver"}
    assert environment.versions["torch"] == torch.__version__


@pytest.mark.gpu
def test_the_environment_of_a_gpu() -> None:
    environment = Environment.of(torch.device("cuda"))
    assert environment.device == torch.cuda.get_device_name()
    assert environment.versions["cuda"] == torch.version.cuda and environment.versions["driver"]


def test_the_commit_is_that_of_the_tree_and_of_no_tree_around_it(tmp_path: Path) -> None:
    def git(*arguments: str) -> Any:
        identity = ("-c", "user.name=n", "-c", "user.email=e@e")
        return subprocess.run(
            ["git", "-C", tmp_path, *identity, *arguments], capture_output=True, text=True, check=True
        )

    assert tree_commit(tmp_path) is None
    git("init", "-q")
    assert tree_commit(tmp_path) is None, "there is no commit yet"
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-q", "-m", "one")
    commit = git("rev-parse", "HEAD").stdout.strip()
    assert tree_commit(tmp_path) == commit
    (tmp_path / "file").write_text("two")
    assert tree_commit(tmp_path) == f"{commit}-dirty"
    (tmp_path / "inside").mkdir()
    assert tree_commit(tmp_path / "inside") is None
