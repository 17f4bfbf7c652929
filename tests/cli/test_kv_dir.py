"""`--kv-dir`: K/V in files, run and planned."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import ds_offload.memory.file_segments as file_segments
from ds_offload.memory.staging_ring import RING_BYTES

LLAMA = ("plan", "--model", "llama-2-7b", "--kv-dtype", "bf16", "--hot-set", "1", "--host-memory", "150GiB")


@pytest.fixture(autouse=True)
def on_a_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk of 100 GiB; temporary folders may be in memory, which is refused elsewhere."""
    monkeypatch.setattr(file_segments, "_file_system", lambda folder: "ext4")
    monkeypatch.setattr(file_segments.shutil, "disk_usage", lambda folder: SimpleNamespace(free=100 << 30))


def test_a_run_in_files(command: Any, refused: Any, ids_model: str, tmp_path: Path) -> None:
    run = ("run", "--model", ids_model, "--device", "cpu", "--prompt", "5 6 7", "--max-new-tokens", "3")
    plain = json.loads(command(*run, "--json").out)
    kv_dir = tmp_path / "kv"
    assert "kv_dir" in refused(*run, "--kv-dir", str(kv_dir)).err
    kv_dir.mkdir()
    ended = command(*run, "--json", "--kv-dir", str(kv_dir))
    assert f"K/V are in files in {kv_dir}, " in ended.err
    result = json.loads(ended.out)
    assert result["token_ids"] == plain["token_ids"] and result["config"]["kv_dir"] == str(kv_dir)
    assert result["stats"]["disk_kv_bytes"] == plain["stats"]["host_kv_bytes"] > 0
    assert "KV cache in files" in command(*run, "--kv-dir", str(kv_dir)).err
    assert "kv_location='gpu'" in refused(*run, "--kv-dir", str(kv_dir), "--kv-location", "gpu").err
    assert list(kv_dir.iterdir()) == []


@pytest.mark.parametrize(("where", "ring"), [(("--device", "cpu"), 0), (("--gpu", "h100"), RING_BYTES[0])])
def test_the_plan_counts_files_apart(where: tuple[str, str], ring: int, command: Any, tmp_path: Path) -> None:
    common = (*LLAMA, *where, "--ctx", "64k", "--json")
    plain, files = (json.loads(command(*common, *more).out) for more in ((), ("--kv-dir", str(tmp_path))))
    assert (plain["host"]["disk"], plain["disk_limit"]) == (0, None)
    assert files["host"]["disk"] == plain["host"]["kv"] == 32 << 30
    assert files["host"]["kv"] == ring
    assert files["host"]["total"] == plain["host"]["total"] - (32 << 30) + ring
    assert files["gpu"] == plain["gpu"] and files["disk_limit"] == 100 << 30


def test_what_files_cost_is_said(command: Any, tmp_path: Path) -> None:
    common = (*LLAMA, "--gpu", "h100", "--kv-dir", str(tmp_path))
    result = json.loads(command(*common, "--ctx", "64k", "--json").out)
    assert result["decode_ms_per_token"] is None and result["prefill_s"] is None
    rows = result["h2d_bytes_per_token"] / 512
    assert result["assumptions"]["times"].startswith(f"none: each of the {rows:,.0f} rows a token that are not on")
    text = command(*common, "--ctx", "64k").out
    assert "32.00 GiB of 100.00 GiB" in text and f"not estimated: each of the {rows:,.0f} rows" in text


def test_a_disk_that_is_too_small(command: Any, tmp_path: Path) -> None:
    common = (*LLAMA, "--gpu", "h100", "--kv-dir", str(tmp_path), "--ctx", "256k")
    ended = command(*common)
    assert ended.status == 1
    assert "does not fit: 128.00 GiB of disk are needed and 100.00 GiB are there; add --kv-dtype int8" in ended.out
    assert command(*common, "--kv-dtype", "int8").status == 0
