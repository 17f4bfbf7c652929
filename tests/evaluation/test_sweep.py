"""A grid of settings: read, measured at every point, shown and drawn."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from ds_offload import InputError, OffloadConfig
from ds_offload.evaluation.perplexity import eval_perplexity
from ds_offload.evaluation.subject import EvalSubject
from ds_offload.evaluation.sweep import SweepGrid, eval_sweep
from ds_offload.evaluation.sweep_picture import print_sweep, save_sweep
from ds_offload.planning.request import host_total

CONTEXT = 256
MakeSubject = Callable[..., EvalSubject]


def test_a_grid_is_read() -> None:
    grid = SweepGrid.parse("1/8, 64", "28x2,4,product", "off,speculative")
    assert grid == SweepGrid(("1/8", "64"), ((28, 2), (None, 4), None), ("off", "speculative"))
    configs = grid.configs(OffloadConfig(label_channels=28), 64)
    assert len(configs) == 12
    labels = {(config.label_code, config.label_channels, config.label_bits) for config in configs}
    assert labels == {("scalar", 28, 2), ("scalar", 14, 4), ("product", 64, None)}
    for head_dim, words in ((24, "label_channels=28 is more than the head's 24"), (30, "a multiple of 4 channels")):
        with pytest.raises(InputError, match=words):
            grid.configs(OffloadConfig(), head_dim)


@pytest.mark.parametrize(
    ("budgets", "labels", "modes", "words"),
    [
        ("", "2", "off", "budgets='' is empty"),
        ("2/1", "2", "off", "token_budget='2/1'"),
        ("1/8", "28x3", "off", "labels='28x3'"),
        ("1/8", "x2", "off", "labels='x2'"),
        ("1/8", "2", "sometimes", "names 'sometimes'"),
    ],
)
def test_a_wrong_grid_is_refused(budgets: str, labels: str, modes: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        SweepGrid.parse(budgets, labels, modes)


def test_every_point_is_what_ppl_measures(subject_of: MakeSubject, text: str, tmp_path: Path) -> None:
    result = eval_sweep(subject_of(), SweepGrid.parse("1/4,1/16", "product,8", "off"), {"text": text}, 12, 1)
    rows = result.options["rows"]
    assert len(rows) == 4
    for row in rows:
        changes = {
            name: row[name] for name in ("token_budget", "label_code", "label_bits", "label_channels", "prefetch")
        }
        alone = eval_perplexity(subject_of(**changes), {"text": text}, 12, 1)
        assert (row["nll"], row["mean_density"]) == (alone.sparse["nll"], alone.density)
        assert row["delta"] == pytest.approx(alone.delta)
    assert result.sparse["nll"] == min(row["nll"] for row in rows)
    console = Console(file=io.StringIO(), width=200)
    print_sweep(result, console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(f"{row['delta']:+.4f}" in shown for row in rows)
    pytest.importorskip("matplotlib")
    save_sweep(result, str(tmp_path / "sweep.png"))
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_more_channels_than_the_head_has_are_refused(subject_of: MakeSubject, text: str) -> None:
    with pytest.raises(InputError, match="label_channels=64 is more than the head's 16"):
        eval_sweep(subject_of(), SweepGrid.parse("1/8", "64x2", "off"), {"text": text}, 12, 1)


def test_all_points_have_the_dtype_that_the_largest_fits_with(subject_of: MakeSubject, text: str) -> None:
    largest = subject_of(token_budget="1/4", label_bits=8, hot_set=1, kv_dtype="fp32").prepared
    needed = host_total(largest.check([CONTEXT - 1], [CONTEXT]), cuda=False)
    grid, texts = SweepGrid.parse("1/4,1/32", "8", "off"), {"text": text}
    result = eval_sweep(subject_of(hot_set=1, host_memory=needed - 1), grid, texts, 12, 1)
    assert [row["kv_dtype"] for row in result.options["rows"]] == ["int8", "int8"]
    assert result.config.kv_dtype == "int8"
    asked = eval_sweep(subject_of(hot_set=1, kv_dtype="int8"), grid, texts, 12, 1)
    assert result.dense == asked.dense and result.options["rows"] == asked.options["rows"]
