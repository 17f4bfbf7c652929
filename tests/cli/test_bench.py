"""`ds-offload bench` from end to end at toy sizes, and what it refuses."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

ROW = {"name", "median", "p20", "p80", "unit", "limit", "ratio"}
KERNELS: dict[str, tuple[str, ...]] = {
    "gather": ("--ctx", "1500", "--kv-heads", "3", "--batch", "2", "--row-bytes", "128,264"),
    "select": ("--ctx", "500,3k", "--rows", "3"),
    "attention": ("--ctx", "300", "--batch", "1,3", "--heads", "4", "--kv-heads", "2", "--head-dim", "32"),
}
DECODE = ("--ctx", "400", "--batch", "2", "--steps", "2", "--token-budget", "100", "--dtype", "fp32")


def bench_json(command: Any, name: str, *arguments: str, device: str = "cpu") -> dict[str, Any]:
    ended = command("bench", name, "--device", device, "--json", *arguments)
    assert ended.status == 0, ended.err
    assert ended.out.count("\n") == 1, "one JSON object and nothing else"
    result = json.loads(ended.out)
    assert f"{name} on {result['device']}" in ended.err
    check(result, name, device)
    return result


def check(result: dict[str, Any], name: str, device: str) -> None:
    assert result["bench"] == name and result["device"].startswith("cpu (") == (device == "cpu")
    assert set(result["versions"]) == {"python", "ds_offload", "torch", "triton", "transformers", "cuda", "driver"}
    assert result["commit"] is None or re.fullmatch("[0-9a-f]{40}(-dirty)?", result["commit"])
    assert set(result["limits"]) == {"link_bytes_per_s", "read_bytes_per_s", "copy_bytes_per_s"}
    names = [row["name"] for row in result["rows"]]
    assert len(set(names)) == len(names) > 0
    for row in result["rows"]:
        assert set(row) >= ROW
        assert 0 < row["p20"] <= row["median"] <= row["p80"]
        assert row["unit"] == {"decode": "ms", "prefill": "s"}.get(name, "us")
        # What transformers' cache moves has no limit of ours.
        expected = None if row["limit"] is None else pytest.approx(row["median"] / row["limit"])
        assert row["ratio"] == expected
        assert (row["limit"] is None) == (name == "decode" and row["name"].startswith("transformers"))


def test_gather(command: Any) -> None:
    result = bench_json(command, "gather", "--samples", "2", *KERNELS["gather"])
    assert result["options"]["samples"] == 2 and result["options"]["tokens"] == 1500
    rows = {row["name"]: row for row in result["rows"]}
    assert len(rows) == 2 * (4 * 2 + 3 + 1)
    row = rows["264 B, all missing, shuffled"]
    assert row["bytes"] == 264 * row["rows"] == 264 * 2 * 3 * 94
    assert row["limit"] == pytest.approx(1e6 * row["bytes"] / result["limits"]["link_bytes_per_s"])
    assert rows["264 B, all missing, CPU gather and copy"]["rows"] == row["rows"]
    assert 0.35 * row["rows"] < rows["264 B, 1/2 missing, ascending"]["rows"] < 0.65 * row["rows"]
    assert rows["264 B, 1/64 missing, ascending, listed in front"]["rows"] < 0.1 * row["rows"]


def test_select(command: Any) -> None:
    result = bench_json(command, "select", "--samples", "2", "--token-budget", "1/4", *KERNELS["select"])
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows)[:3] == ["3 x 500, select_tokens", "3 x 500, torch.topk", "3 x 500, torch.topk, sorted indices"]
    row = rows["3 x 3,072, select_tokens"]
    assert row["kept"] == 768 and row["bytes"] == 3 * (3072 * 4 + 768 * 8)
    fastest = max(result["limits"]["read_bytes_per_s"], result["limits"]["copy_bytes_per_s"])
    assert row["limit"] == pytest.approx(1e6 * row["bytes"] / fastest)


def test_attention(command: Any) -> None:
    result = bench_json(command, "attention", "--samples", "2", *KERNELS["attention"])
    rows = {row["name"]: row for row in result["rows"]}
    codes = ("product code", "12 x 2 bit", "6 x 4 bit")
    assert len(rows) == 2 * (3 + len(codes))
    read = [rows[f"batch 3, 300 tokens, label scores, {code}"]["bytes"] for code in codes]
    assert read == [3 * 2 * 300 * 4] * 3
    sparse, dense, torchs = (
        rows[f"batch 3, 300 tokens, {name}"] for name in ("sparse", "slot attention", "torch SDPA")
    )
    assert dense["bytes"] == torchs["bytes"] == 3 * 2 * 300 * 2 * 32 * 4
    assert sparse["kept"] == 19 and sparse["bytes"] > 3 * 2 * 19 * 2 * 32 * 4
    assert sparse["byte_ratio"] == pytest.approx(dense["bytes"] / sparse["bytes"])
    assert sparse["speedup_vs_sdpa"] == pytest.approx(torchs["median"] / sparse["median"])
    assert sparse["speedup_vs_dense"] == pytest.approx(dense["median"] / sparse["median"])


def test_decode(command: Any, ids_model: str) -> None:
    result = bench_json(command, "decode", "--model", ids_model, "--with-transformers", *DECODE)
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows)[:3] == ["floor: every row over the link", "paper", "ours"]
    floor = rows["floor: every row over the link"]
    assert floor["computed"] and floor["bytes"] == 3 * 2 * 2 * 400 * 2 * 32 * 4
    assert floor["median"] == pytest.approx(1000 * floor["bytes"] / result["limits"]["link_bytes_per_s"])
    # Sinks, recent window and the current token stay on the device.
    assert rows["paper"]["h2d_bytes_per_token"] == 3 * 2 * (100 - 4 - 65) * 2 * 32 * 4
    assert rows["ours"]["h2d_bytes_per_token"] < rows["paper"]["h2d_bytes_per_token"]
    assert rows["compute-only"]["h2d_bytes_per_token"] == 0
    assert 0.5 < rows["ours"]["prefetch_recall"] < 1 and 0 < rows["ours"]["hit_rate"] < 1
    assert result["options"]["config"]["token_budget"] == "100" and result["options"]["tokens"] == 400
    assert result["notes"] == ["transformers' offloaded cache was left out: it needs a CUDA device"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("--selections", "random", "--prefetch", "off"),
        ("--selections", "random", "--token-budget", "top-p:0.9"),
        ("--kv-location", "gpu"),
        ("--dense-layers", "0,2"),
        ("--token-budget", "1/1"),
        ("--token-budget", "8"),
        ("--monitor", "off"),
    ],
)
def test_decode_with_other_options(command: Any, ids_model: str, arguments: tuple[str, ...]) -> None:
    result = bench_json(
        command, "decode", "--model", ids_model, "--variants", "ours,prefetch-exact", *DECODE, *arguments
    )
    assert [row["name"] for row in result["rows"]][1:] == ["ours", "prefetch-exact"]
    assert result["options"]["config"]["monitor"] == "off", "none runs, and its memory is not planned"


def test_prefill(command: Any, ids_model: str) -> None:
    arguments = ("--model", ids_model, "--ctx", "300", "--repeats", "2", "--dtype", "fp32")
    result = bench_json(command, "prefill", *arguments)
    assert [row["name"] for row in result["rows"]] == ["prefill, warm", "prefill, nothing leaves for the store"]
    assert result["options"]["tokens"] == 300 and result["rows"][0]["ratio"] > 0


def test_the_table_alone(command: Any) -> None:
    ended = command("bench", "select", "--device", "cpu", "--samples", "1", *KERNELS["select"])
    assert ended.status == 0 and ended.out == ""
    assert "torch.topk" in ended.err and "ratio" in ended.err and "times of the CPU's code" in ended.err


def test_the_picture(command: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "rows.png"
    bench_json(command, "select", "--samples", "1", "--plot", str(picture), *KERNELS["select"])
    assert picture.stat().st_size > 1000


def test_alone_it_prints_help(command: Any) -> None:
    ended = command("bench")
    assert ended.status == 0 and ended.err == ""
    assert all(name in ended.out for name in ("decode", *KERNELS))
    assert "--token-budget" in command("bench", "decode", "--help").out


def wrong_inputs() -> dict[str, tuple[list[str], str]]:
    """Arguments (MODEL stands for a model's folder) and words of the line they end in."""
    decode = ["decode", "--device", "cpu", "--model", "MODEL"]
    return {
        "unknown bench": (["sort"], "'sort'"),
        "unknown option": (["select", "--depth", "3"], "--depth"),
        "no such device": (["gather", "--device", "tpu"], "device='tpu'"),
        "no size": (["select", "--ctx", "many"], "ctx='many'"),
        "empty list": (["attention", "--batch", ","], "batch=','"),
        "no samples": (
            ["select", "--samples", "0"],
            "samples='0' must be at least 1 and under 2^53; write a whole number",
        ),
        "half a batch": (["attention", "--batch", "1,0.5x"], "batch='0.5x' is not a size; write a whole number"),
        "a budget of scores": (["select", "--token-budget", "top-p:0.9"], "depends on the scores"),
        "odd rows": (["gather", "--row-bytes", "100"], "row_bytes=100"),
        "heads that do not divide": (["attention", "--heads", "6", "--kv-heads", "4"], "heads=6"),
        "rows beyond the memory": (["gather", "--device", "cpu", "--ctx", "8g"], "GiB of host memory"),
        "scores beyond the memory": (["select", "--device", "cpu", "--ctx", "400g"], "GiB of host memory"),
        "batch beyond the memory": (["attention", "--device", "cpu", "--batch", "64k"], "GiB of host memory"),
        "batch and a half": ([*decode, "--batch", "1.5"], "batch='1.5' is not a whole number"),
        "batch of no machine": ([*decode, "--batch", "1000000"], "batch='1000000' must be at most 65,536 sequences"),
        "batch of many digits": (["gather", "--batch", "9" * 5000], "must be at least 1 and under 2^53"),
        "context beyond the memory": ([*decode, "--ctx", "1g"], "GiB of host memory"),
        "no model": (["decode", "--model", "no-such-model"], "no-such-model"),
        "no steps": ([*decode, "--steps", "0"], "steps='0'"),
        "too few warm-ups": ([*decode, "--warm-ups", "1"], "warm_ups=1"),
        "no such selections": ([*decode, "--selections", "real"], "selections='real'"),
        "no such variant": ([*decode, "--variants", "theirs"], "variants='theirs'"),
        "rows that do not move": ([*decode, "--variants", "paper", "--kv-location", "gpu"], "--kv-location host"),
        "replayed scores": ([*decode, "--token-budget", "top-p:0.9"], "--selections random"),
        "a field out of range": ([*decode, "--label-bits", "3"], "label_bits=3"),
        "a monitor": ([*decode, "--monitor", "widen"], "--monitor widen has no effect here"),
        "a monitored prefill": (["prefill", "--monitor-every", "1"], "--monitor-every has no effect here"),
        "no picture": (["select", "--plot", "rows.txt"], "rows.txt"),
        "no folder for the picture": (["select", "--plot", "missing/rows.png"], "no folder"),
    }


@pytest.mark.parametrize("case", wrong_inputs())
def test_wrong_input_is_one_line(refused: Any, ids_model: str, case: str) -> None:
    arguments, words = wrong_inputs()[case]
    line = refused("bench", *[ids_model if argument == "MODEL" else argument for argument in arguments]).err
    assert words in line, line


def test_without_matplotlib_a_picture_is_refused_at_once(refused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    assert "pip install matplotlib" in refused("bench", "select", "--plot", "rows.png").err


def test_an_interruption_ends_cleanly(command: Any, ids_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []
    close = "ds_offload.bench.filled_context.FilledRows.close"
    monkeypatch.setattr(close, lambda rows: closed.append(len(rows._segments)))

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ds_offload.bench.decode.time_steps", interrupt)
    ended = command("bench", "decode", "--device", "cpu", "--model", ids_model, *DECODE)
    assert (ended.status, ended.out, ended.error_lines[-1]) == (130, "", "ds-offload: interrupted")
    assert closed == [2]


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(KERNELS))
def test_kernels_on_a_gpu(command: Any, name: str) -> None:
    result = bench_json(command, name, "--samples", "3", *KERNELS[name], device="cuda")
    assert result["versions"]["driver"] and result["device"] == torch.cuda.get_device_name()


@pytest.mark.gpu
@pytest.mark.parametrize("location", ["host", "gpu"])
def test_decode_on_a_gpu(command: Any, ids_model: str, location: str) -> None:
    """Every variant, transformers' cache too, in the dtype that its kernels take."""
    arguments = ("--ctx", "3k", "--steps", "4", "--warm-ups", "4", "--batch", "2", "--kv-location", location)
    result = bench_json(command, "decode", "--model", ids_model, "--with-transformers", *arguments, device="cuda")
    names = [row["name"] for row in result["rows"]]
    assert names[:2] == ["floor: every row over the link", "transformers"] and "ours" in names
    assert ("paper" in names) == (location == "host")
    assert all(row["link_busy_ms"] > 0 for row in result["rows"] if row.get("h2d_bytes_per_token"))
