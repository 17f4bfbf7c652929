"""What the operating system allows: memory, control groups, memlock, NUMA, huge pages, disk."""

from __future__ import annotations

import mmap
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ds_offload.machine.check import FAIL, OK, WARN, Check
from ds_offload.machine.host_memory import HostMemory

if TYPE_CHECKING:
    import torch

# The default model and some calibrations.
_DISK_BYTES = 2 << 30


def host_checks(
    memory: HostMemory, device: torch.device | None, cache: Path, pinned_bytes: int | None, root: Path = Path("/")
) -> Iterator[Check]:
    """Checks of the system that take no time.

    Args:
        device: Where the runtime would compute; None where torch does not work.
        cache: The cache folder; it need not exist.
        pinned_bytes: What was page-locked in a trial; None without one.
    """
    yield check_memory(memory)
    yield check_cgroups(memory)
    yield check_memlock(memory, pinned_bytes)
    yield check_numa(device, root)
    yield check_huge_pages(root)
    yield check_disk(cache)


def check_memory(memory: HostMemory) -> Check:
    """Host memory that this process may use."""
    figures = {
        "total_bytes": memory.total_bytes,
        "available_bytes": memory.available_bytes,
        "usable_bytes": memory.usable_bytes,
    }
    value = f"{memory.usable_bytes / 2**30:.2f} GiB can be used: {memory.usable_reason}"
    return Check("host memory", OK, value, figures=figures)


def check_cgroups(memory: HostMemory) -> Check:
    """Control groups that limit memory."""
    if not memory.cgroups:
        return Check("cgroup", OK, "no limit")
    parts = [
        f"{group.path}: {group.used_bytes / 2**30:.2f} of {group.limit_bytes / 2**30:.2f} GiB in use"
        for group in memory.cgroups
    ]
    figures = {
        "groups": [
            {"path": group.path, "limit_bytes": group.limit_bytes, "used_bytes": group.used_bytes}
            for group in memory.cgroups
        ]
    }
    if memory.usable_bytes < memory.available_bytes:
        cure = "Raise the limit of the container or the service (docker run --memory, MemoryMax of systemd)."
        return Check("cgroup", WARN, f"{'; '.join(parts)}: less than the machine has", cure, figures)
    return Check("cgroup", OK, "; ".join(parts), figures=figures)


def check_memlock(memory: HostMemory, pinned_bytes: int | None) -> Check:
    """The limit of locked memory, which not every driver counts."""
    limit = memory.memlock_bytes
    figures = {"limit_bytes": limit}
    if limit is None:
        return Check("memlock", OK, "no limit for this process", figures=figures)
    value = f"{limit / 2**10:,.0f} KiB"
    if pinned_bytes is not None and pinned_bytes > limit:
        return Check("memlock", OK, f"{value}, which the driver does not count", figures=figures)
    if limit >= memory.usable_bytes:
        return Check("memlock", OK, value, figures=figures)
    cure = "If the driver refuses to page-lock: `ulimit -l unlimited`, or docker run --ulimit memlock=-1."
    return Check("memlock", WARN, f"{value}, which some drivers count", cure, figures)


def check_numa(device: torch.device | None, root: Path = Path("/")) -> Check:
    """Nodes with memory, the GPU's, and whether memory can be placed on it."""
    if device is None:
        return Check("numa", OK, "not looked at: torch does not work")
    from ds_offload.machine.numa import gpu_node, memory_nodes

    nodes = memory_nodes(root)
    if len(nodes) < 2:
        return Check("numa", OK, "one node" if nodes else "unknown: the system does not say", figures={"nodes": nodes})
    node = gpu_node(device, root) if device.type == "cuda" else None
    figures = {"nodes": nodes, "gpu_node": node}
    value = f"{len(nodes)} nodes with memory"
    if device.type != "cuda":
        return Check("numa", OK, value, figures=figures)
    if node is None:
        cure = "Find the GPU's node with nvidia-smi topo -m, and run under numactl --preferred=NODE."
        return Check("numa", WARN, f"{value}, {device} on an unknown one", cure, figures)
    value += f", {device} on node {node}"
    refusal = _placing_fails(node)
    if refusal is not None:
        cure = f"Run under numactl --preferred={node}, or start docker with --cap-add SYS_NICE."
        return Check("numa", WARN, f"{value}; memory cannot be placed ({refusal})", cure, figures)
    return Check("numa", OK, f"{value}, where pinned memory is placed", figures=figures)


def check_huge_pages(root: Path = Path("/")) -> Check:
    """Transparent huge pages, for private memory, as which the pinned pool is mapped, and for shared memory."""
    folder = root / "sys/kernel/mm/transparent_hugepage"
    private, shared = (_chosen(folder / name) for name in ("enabled", "shmem_enabled"))
    if private is None:
        return Check("huge pages", OK, "the system has no transparent huge pages")
    figures = {"enabled": private, "shmem_enabled": shared}
    return Check("huge pages", OK, f"transparent: {private}, shared memory: {shared or 'unknown'}", figures=figures)


def check_disk(cache: Path) -> Check:
    """Room in the cache folder, and whether it can be written."""
    there = next((folder for folder in (cache, *cache.parents) if folder.exists()), Path("/"))
    cure = "Set DS_OFFLOAD_CACHE to a folder with room that you can write."
    try:
        free = shutil.disk_usage(there).free
    except OSError as error:
        return Check("cache folder", FAIL, f"{cache}: {error.strerror}", cure)
    figures = {"path": str(cache), "free_bytes": free}
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        return Check("cache folder", FAIL, f"{cache} cannot be written", cure, figures)
    value = f"{cache}: {free / 2**30:.1f} GiB free"
    if free < _DISK_BYTES:
        return Check("cache folder", WARN, f"{value}, too little for models", cure, figures)
    return Check("cache folder", OK, value, figures=figures)


def _placing_fails(node: int) -> str | None:
    """Why a page cannot be placed on a node; None if it can."""
    import torch

    from ds_offload.machine.numa import prefer_node

    page = mmap.mmap(-1, mmap.PAGESIZE)
    try:
        prefer_node(torch.frombuffer(page, dtype=torch.uint8).data_ptr(), mmap.PAGESIZE, node)
    except OSError as error:
        return error.strerror or str(error)
    return None


def _chosen(path: Path) -> str | None:
    """The word in brackets of a setting such as "always [madvise] never"."""
    try:
        found = re.search(r"\[(\w+)\]", path.read_text(encoding="ascii"))
    except OSError:
        return None
    return found[1] if found else None
