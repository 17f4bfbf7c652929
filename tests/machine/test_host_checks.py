"""The system's checks over made-up bounds and trees."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ds_offload.machine import host_checks as checks
from ds_offload.machine.cgroups import CgroupLimit
from ds_offload.machine.host_memory import HostMemory

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
GIB = 1 << 30


def bounds(usable: int = 50 * GIB, memlock: int | None = None, *groups: CgroupLimit) -> HostMemory:
    return HostMemory(64 * GIB, 50 * GIB, groups, memlock, usable, "a reason")


def test_memory_says_what_sets_the_bound() -> None:
    found = checks.check_memory(bounds())
    assert found.status == "ok" and found.value == "50.00 GiB can be used: a reason"
    assert found.figures["usable_bytes"] == 50 * GIB


def test_a_group_that_sets_the_bound_is_a_warning() -> None:
    assert checks.check_cgroups(bounds()).value == "no limit"
    small, large = CgroupLimit("/box", 8 * GIB, 2 * GIB), CgroupLimit("/", 900 * GIB, 0)
    found = checks.check_cgroups(bounds(6 * GIB, None, small))
    assert found.status == "warn" and "/box: 2.00 of 8.00 GiB in use" in found.value and "--memory" in found.cure
    assert checks.check_cgroups(bounds(50 * GIB, None, large)).status == "ok"


@pytest.mark.parametrize(
    ("memlock", "pinned", "status"),
    [
        (None, None, "ok"),
        (65536, None, "warn"),
        (65536, 0, "warn"),
        (65536, GIB, "ok"),
        (60 * GIB, None, "ok"),
    ],
)
def test_memlock_is_a_warning_unless_a_trial_went_beyond_it(
    memlock: int | None, pinned: int | None, status: str
) -> None:
    found = checks.check_memlock(bounds(50 * GIB, memlock), pinned)
    assert found.status == status and ("ulimit -l unlimited" in found.cure) == (status == "warn")


def nodes(root: Path, text: str) -> Path:
    folder = root / "sys/devices/system/node"
    folder.mkdir(parents=True)
    (folder / "has_memory").write_text(text, encoding="ascii")
    return root


@pytest.mark.parametrize(
    ("device", "text", "node", "refusal", "status", "words"),
    [
        (CPU, "0", None, None, "ok", "one node"),
        (CUDA, "0", None, None, "ok", "one node"),
        (CPU, "0-1", None, None, "ok", "2 nodes"),
        (CUDA, "0-1", 1, None, "ok", "cuda:0 on node 1"),
        (CUDA, "0-1", None, None, "warn", "unknown"),
        (CUDA, "0-1", 1, "Operation not permitted", "warn", "Operation not permitted"),
    ],
)
def test_numa(
    device: torch.device,
    text: str,
    node: int | None,
    refusal: str | None,
    status: str,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ds_offload.machine.numa.gpu_node", lambda device, root: node)
    monkeypatch.setattr(checks, "_placing_fails", lambda node: refusal)
    found = checks.check_numa(device, nodes(tmp_path, text))
    assert found.status == status and words in found.value and ("numactl" in found.cure) == (status == "warn")


def test_a_node_that_is_not_there_cannot_be_placed_on(tmp_path: Path) -> None:
    assert checks._placing_fails(900)
    assert "unknown" in checks.check_numa(CPU, tmp_path).value
    assert checks.check_numa(None, tmp_path).status == "ok"


def test_huge_pages(tmp_path: Path) -> None:
    assert "no transparent huge pages" in checks.check_huge_pages(tmp_path).value
    folder = tmp_path / "sys/kernel/mm/transparent_hugepage"
    folder.mkdir(parents=True)
    (folder / "enabled").write_text("always [madvise] never\n", encoding="ascii")
    assert checks.check_huge_pages(tmp_path).figures == {"enabled": "madvise", "shmem_enabled": None}
    (folder / "shmem_enabled").write_text("always within_size advise [never] deny force\n", encoding="ascii")
    assert checks.check_huge_pages(tmp_path).figures == {"enabled": "madvise", "shmem_enabled": "never"}


@pytest.mark.parametrize(("free", "status"), [(100 * GIB, "ok"), (GIB, "warn")])
def test_room_in_a_cache_folder_that_is_not_there_yet(
    free: int, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    found = checks.check_disk(tmp_path / "not" / "there")
    assert found.status == status and found.figures["free_bytes"] == free
    assert not (tmp_path / "not").exists()


def test_a_cache_folder_that_cannot_be_written_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    assert checks.check_disk(tmp_path / "file").status == "fail"
    monkeypatch.setattr(os, "access", lambda *_: False)
    found = checks.check_disk(tmp_path)
    assert found.status == "fail" and "DS_OFFLOAD_CACHE" in found.cure


def test_all_of_them_on_this_machine(tmp_path: Path) -> None:
    from ds_offload.machine.host_memory import host_memory

    found: list[Any] = list(checks.host_checks(host_memory(), None, tmp_path, None))
    names = ["host memory", "cgroup", "memlock", "numa", "huge pages", "cache folder"]
    assert [check.name for check in found] == names
    assert all(bool(check.cure) == (check.status != "ok") for check in found)
