"""NUMA nodes, and host memory placed on the node that the GPU is attached to."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import sys
from pathlib import Path

import torch

from ds_offload.machine.gpu import pci_id, pci_number
from ds_offload.notices import notice

# Of the system call mbind, which libnuma only wraps.
_CALL = {"x86_64": 237, "aarch64": 235}
# Another node where the wanted one is full: binding for good would end in the out-of-memory killer.
_PREFERRED = 1


def memory_nodes(root: Path = Path("/")) -> list[int]:
    """Numbers of the nodes that have memory; empty where the system does not say."""
    try:
        text = (root / "sys/devices/system/node/has_memory").read_text(encoding="ascii").strip()
        nodes: list[int] = []
        for part in filter(None, text.split(",")):
            first, _, last = part.partition("-")
            nodes += range(int(first), int(last or first) + 1)
    except (OSError, ValueError):
        return []
    return nodes


def gpu_node(device: torch.device, root: Path = Path("/")) -> int | None:
    """The node that a CUDA device is attached to; None where the system does not say."""
    address = pci_id(device)
    node = None if address is None else pci_number(address, "numa_node", root)
    return node if node is not None and node >= 0 else None


def prefer_node(address: int, size: int, node: int) -> None:
    """Have pages of a mapping that are touched from now on come from `node` while it has some.

    Args:
        address: Of the first page.
        size: In bytes, whole pages.

    Raises:
        OSError: The system does not place memory, or refuses to (containers without CAP_SYS_NICE).
    """
    call = _CALL.get(platform.machine()) if sys.platform == "linux" else None
    if call is None:
        raise OSError(f"memory is not placed on {sys.platform} {platform.machine()}")
    bits = 8 * ctypes.sizeof(ctypes.c_ulong)
    words = node // bits + 1
    mask = (ctypes.c_ulong * words)()
    mask[node // bits] = 1 << node % bits
    libc = ctypes.CDLL(None, use_errno=True)
    failed = libc.syscall(
        ctypes.c_long(call),
        ctypes.c_void_p(address),
        ctypes.c_ulong(size),
        ctypes.c_int(_PREFERRED),
        mask,
        ctypes.c_ulong(words * bits + 1),
        ctypes.c_uint(0),
    )
    if failed:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def place_near(device: torch.device, address: int, size: int) -> None:
    """Prefer the GPU's node for a mapping, where there are several; what came of it is said once."""
    node = wanted_node(device)
    if node is None:
        return
    try:
        prefer_node(address, size, node)
    except OSError as error:
        _say(
            f"pinned memory could not be placed on NUMA node {node}, which {device} is attached to "
            f"({error.strerror or error}); run under: numactl --preferred={node}"
        )
    else:
        say_placed(device, node)


def say_placed(device: torch.device, node: int) -> None:
    """Say once that host memory comes from a node."""
    _say(f"pinned memory is placed on NUMA node {node}, which {device} is attached to")


@functools.cache
def wanted_node(device: torch.device) -> int | None:
    """The node to prefer; None on a machine with one node, or where the GPU's is not known."""
    nodes = memory_nodes()
    if len(nodes) < 2:
        return None
    node = gpu_node(device)
    return node if node in nodes else None


@functools.cache
def _say(message: str) -> None:
    notice(message)
