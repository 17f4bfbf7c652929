"""How much host memory this process may use and lock, and what sets the bound."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil

from ds_offload.machine.cgroups import CgroupLimit, cgroup_limits

try:
    import resource
except ImportError:  # Windows has no such limits.
    resource = None  # type: ignore[assignment]

_CAP_IPC_LOCK = 14


@dataclass(frozen=True)
class HostMemory:
    """Bounds of host memory, in bytes.

    Attributes:
        total_bytes, available_bytes: Of the machine: installed, and free or free at once.
        cgroups: Control groups with a limit.
        memlock_bytes: Most that `mlock` gives this process; None is no limit. CAP_IPC_LOCK lifts it.
            NVIDIA's module for Linux does not count what it pins against it (`os_lock_user_pages`
            of its kernel-open/nvidia/os-mlock.c), so more can usually be pinned, and only trying
            it tells: `ds-offload doctor` does.
        usable_bytes, usable_reason: What this process may use, and what sets that.
    """

    total_bytes: int
    available_bytes: int
    cgroups: tuple[CgroupLimit, ...]
    memlock_bytes: int | None
    usable_bytes: int
    usable_reason: str

    @classmethod
    def read(cls, root: Path, *, total: int, available: int, memlock: int | None) -> HostMemory:
        """The bounds by the files under `root` ("/", or a tree like it) and the given figures."""
        groups = tuple(cgroup_limits(root))
        usable, reason = available, f"{_gib(available)} of {_gib(total)} are available"
        for group in groups:
            if group.free_bytes < usable:
                usable = group.free_bytes
                reason = f"cgroup {group.path} limits memory to {_gib(group.limit_bytes)}"
                reason += f", of which {_gib(group.used_bytes)} are in use"
        memlock = None if memlock is None or _may_lock(root) else memlock
        return cls(total, available, groups, memlock, usable, reason)


def host_memory() -> HostMemory:
    """The bounds of this process now."""
    memory = psutil.virtual_memory()
    return HostMemory.read(Path("/"), total=memory.total, available=memory.available, memlock=memlock_limit())


def memlock_limit() -> int | None:
    """The soft limit of locked memory in bytes; None where there is none."""
    if resource is None or not hasattr(resource, "RLIMIT_MEMLOCK"):
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft


def _may_lock(root: Path) -> bool:
    """Whether the process has CAP_IPC_LOCK, for which memlock does not hold."""
    try:
        lines = (root / "proc/self/status").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    for line in lines:
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> _CAP_IPC_LOCK & 1)
    return False


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
