"""Measured bandwidths: kept whole or not at all, read only for the same GPU and driver."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_offload.machine import bandwidth
from ds_offload.machine.bandwidth import (
    Bandwidths,
    bandwidth_file,
    measure_bandwidths,
    measured_bandwidths,
    read_bandwidths,
    write_bandwidths,
)

NAME, DRIVER = "NVIDIA H100 80GB HBM3", "580.159.04"
RATES = Bandwidths(link_gb_per_s=50.5, back_gb_per_s=49.0, gather_gb_per_s=44.25, memory_gb_per_s=2900.0)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DS_OFFLOAD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_what_was_written_is_read(cache: Path) -> None:
    path = bandwidth_file(NAME, DRIVER)
    assert path == cache / "machine" / "nvidia-h100-80gb-hbm3-580.159.04.json"
    assert read_bandwidths(path, NAME, DRIVER) is None
    for rates in (RATES, Bandwidths(1.0, 2.0, 3.0, 4.0)):
        write_bandwidths(rates, path, NAME, DRIVER)
        assert read_bandwidths(path, NAME, DRIVER) == rates
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_another_gpu_or_driver_has_its_own_file() -> None:
    names = [(NAME, DRIVER), (NAME, "581.1"), (NAME, None), ("NVIDIA L4", DRIVER)]
    assert len({bandwidth_file(*name) for name in names}) == 4
    path = bandwidth_file(NAME, DRIVER)
    write_bandwidths(RATES, path, NAME, DRIVER)
    for name in names[1:]:
        assert read_bandwidths(path, *name) is None


@pytest.mark.parametrize("name", ["../../x", "a/b\\c", "", "é"])
def test_a_gpus_name_makes_no_path(name: str, cache: Path) -> None:
    path = bandwidth_file(name, "1/../2")
    assert path.parent == cache / "machine" and path.suffix == ".json"


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"link_gb_per_s": "50"},
        {"back_gb_per_s": 0},
        {"gather_gb_per_s": -3.0},
        {"memory_gb_per_s": None},
        {"memory_gb_per_s": True},
        {"memory_gb_per_s": float("inf")},
        {"link_gb_per_s": float("nan")},
        {"device": None},
    ],
)
def test_a_file_that_is_not_sound_counts_as_none(change: dict[str, Any]) -> None:
    path = bandwidth_file(NAME, DRIVER)
    write_bandwidths(RATES, path, NAME, DRIVER)
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | change), encoding="utf-8")
    assert read_bandwidths(path, NAME, DRIVER) is None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"{}" + b" " * 70_000])
def test_a_damaged_file_counts_as_none(content: bytes) -> None:
    path = bandwidth_file(NAME, DRIVER)
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    assert read_bandwidths(path, NAME, DRIVER) is None


def test_a_folder_that_cannot_be_written_is_a_warning(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache.write_text("a file", encoding="utf-8")
    write_bandwidths(RATES, bandwidth_file(NAME, DRIVER), NAME, DRIVER)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "DS_OFFLOAD_CACHE" in said


def test_a_cpu_has_none() -> None:
    assert measured_bandwidths(torch.device("cpu")) is None
    with pytest.raises(ValueError, match="CUDA device"):
        measure_bandwidths(torch.device("cpu"))


def test_the_gathers_tokens_are_ascending_and_distinct(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("KV_HEADS", 3), ("TOKENS", 50), ("KEPT", 7)):
        monkeypatch.setattr(bandwidth, name, value)
    tokens = bandwidth._ascending_tokens(0)
    assert tokens.shape == (1, 3, 7) and tokens.dtype == torch.int64
    assert bool((tokens.diff(dim=-1) > 0).all()) and int(tokens.min()) >= 0 and int(tokens.max()) < 50
    assert not torch.equal(tokens, bandwidth._ascending_tokens(1))


@pytest.mark.gpu
def test_measured_once_and_read_after() -> None:
    device = torch.device("cuda", 0)
    assert measured_bandwidths(device) is None
    rates = measure_bandwidths(device)
    assert measured_bandwidths(device) == rates
    assert 1 < rates.gather_gb_per_s < 1.1 * rates.link_gb_per_s < rates.memory_gb_per_s
    assert 0.3 * rates.link_gb_per_s < rates.back_gb_per_s < 3 * rates.link_gb_per_s
