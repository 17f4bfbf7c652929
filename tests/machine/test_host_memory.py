"""What sets the bound of host memory, in made-up trees and on this machine."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from ds_offload.config import OffloadConfig
from ds_offload.machine import host_memory as module
from ds_offload.machine.host_memory import HostMemory, host_memory, memlock_limit
from ds_offload.memory_check import _host_limit

GIB = 1 << 30
CGROUP = {
    "proc/self/cgroup": "0::/box\n",
    "proc/self/mountinfo": "31 23 0:28 / /cg rw - cgroup2 cgroup2 rw\n",
    "cg/box/memory.max": f"{8 * GIB}\n",
    "cg/box/memory.current": f"{2 * GIB}\n",
}


def read(root: Path, files: dict[str, str], memlock: int | None = None, available: int = 50 * GIB) -> HostMemory:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content, encoding="utf-8")
    return HostMemory.read(root, total=64 * GIB, available=available, memlock=memlock)


def test_the_machine_sets_the_bound_where_no_group_does(tmp_path: Path) -> None:
    memory = read(tmp_path, {})
    assert memory.usable_bytes == 50 * GIB and memory.memlock_bytes is None
    assert memory.usable_reason == "50.00 GiB of 64.00 GiB are available"


def test_a_group_sets_the_bound_where_it_leaves_less(tmp_path: Path) -> None:
    memory = read(tmp_path, CGROUP)
    assert memory.usable_bytes == 6 * GIB
    assert memory.usable_reason == "cgroup /box limits memory to 8.00 GiB, of which 2.00 GiB are in use"
    assert read(tmp_path, CGROUP, available=5 * GIB).usable_bytes == 5 * GIB


@pytest.mark.parametrize(("capabilities", "holds"), [("0000000000000000", True), ("000001ffffffffff", False)])
def test_memlock_bounds_what_may_be_locked_but_for_cap_ipc_lock(capabilities: str, holds: bool, tmp_path: Path) -> None:
    memory = read(tmp_path, {"proc/self/status": f"Name:\tx\nCapEff:\t{capabilities}\n"}, memlock=65536)
    assert memory.usable_bytes == 50 * GIB
    assert memory.memlock_bytes == (65536 if holds else None)


def test_this_process_may_use_no_more_than_is_available() -> None:
    memory = host_memory()
    assert 0 < memory.usable_bytes <= memory.available_bytes <= memory.total_bytes == psutil.virtual_memory().total


def test_a_system_without_limits_has_no_memlock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "resource", None)
    assert memlock_limit() is None


def test_the_memory_check_knows_of_control_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = read(tmp_path, CGROUP)
    monkeypatch.setattr("ds_offload.memory_check.host_memory", lambda: memory)
    assert _host_limit(OffloadConfig()) == 6 * GIB
    assert _host_limit(OffloadConfig(host_memory="1GiB")) == GIB
    assert _host_limit(OffloadConfig(host_memory="20GiB")) == 6 * GIB
