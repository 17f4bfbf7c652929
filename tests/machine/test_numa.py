"""Nodes in made-up trees, and memory placed on a node of this machine."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import pytest
import torch

from ds_offload.machine import numa
from ds_offload.machine.numa import gpu_node, memory_nodes, place_near, prefer_node

CUDA = torch.device("cuda", 0)
PCI = "0000:17:00.0"


@pytest.mark.parametrize(
    ("text", "nodes"), [("0\n", [0]), ("0-3\n", [0, 1, 2, 3]), ("0,2-3,8\n", [0, 2, 3, 8]), ("\n", []), ("x\n", [])]
)
def test_nodes_with_memory(text: str, nodes: list[int], tmp_path: Path) -> None:
    assert memory_nodes(tmp_path) == []
    folder = tmp_path / "sys/devices/system/node"
    folder.mkdir(parents=True)
    (folder / "has_memory").write_text(text, encoding="ascii")
    assert memory_nodes(tmp_path) == nodes


@pytest.mark.parametrize(("text", "node"), [("1\n", 1), ("-1\n", None), ("", None)])
def test_the_node_of_a_gpu(text: str, node: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numa, "pci_id", lambda device: PCI)
    assert gpu_node(CUDA, tmp_path) is None
    folder = tmp_path / "sys/bus/pci/devices" / PCI
    folder.mkdir(parents=True)
    (folder / "numa_node").write_text(text, encoding="ascii")
    assert gpu_node(CUDA, tmp_path) == node
    monkeypatch.setattr(numa, "pci_id", lambda device: None)
    assert gpu_node(CUDA, tmp_path) is None


def place_a_page(node: int) -> None:
    page = mmap.mmap(-1, mmap.PAGESIZE)
    prefer_node(torch.frombuffer(page, dtype=torch.uint8).data_ptr(), mmap.PAGESIZE, node)
    page.write(b"x")


@pytest.mark.skipif(sys.platform != "linux", reason="the system call is Linux's")
def test_a_page_is_placed_on_a_node_that_is_there_and_on_no_other() -> None:
    try:
        place_a_page(0)
    except PermissionError:
        pytest.skip("this container may not place memory")
    except OSError as error:
        pytest.skip(f"this system does not place memory: {error}")
    for node in (63, 200, 900):
        with pytest.raises(OSError):
            place_a_page(node)


def test_another_system_says_that_it_does_not_place_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numa.platform, "machine", lambda: "pdp11")
    with pytest.raises(OSError, match="pdp11"):
        place_a_page(0)


@pytest.mark.parametrize("allowed", [True, False])
def test_what_became_of_placing_is_said_once(
    allowed: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    placed = []

    def prefer(address: int, size: int, node: int) -> None:
        if not allowed:
            raise PermissionError(1, "Operation not permitted")
        placed.append((address, size, node))

    monkeypatch.setattr(numa, "memory_nodes", lambda: [0, 1])
    monkeypatch.setattr(numa, "gpu_node", lambda device: 1)
    monkeypatch.setattr(numa, "prefer_node", prefer)
    numa.wanted_node.cache_clear()
    numa._say.cache_clear()
    try:
        place_near(CUDA, 4096, 8192)
        place_near(CUDA, 16384, 4096)
    finally:
        numa.wanted_node.cache_clear()
        numa._say.cache_clear()
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "NUMA node 1" in said[0]
    assert ("numactl --preferred=1" in said[0]) == (not allowed)
    assert placed == ([(4096, 8192, 1), (16384, 4096, 1)] if allowed else [])


@pytest.mark.parametrize(("nodes", "node"), [([0], 0), ([], None), ([0, 1], None), ([0, 1], 5)])
def test_nothing_is_placed_or_said_where_there_is_no_choice(
    nodes: list[int], node: int | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(numa, "memory_nodes", lambda: nodes)
    monkeypatch.setattr(numa, "gpu_node", lambda device: node)
    monkeypatch.setattr(numa, "prefer_node", lambda *_: pytest.fail("nothing is to be placed"))
    numa.wanted_node.cache_clear()
    try:
        place_near(CUDA, 4096, 8192)
    finally:
        numa.wanted_node.cache_clear()
    assert capsys.readouterr().err == ""


@pytest.mark.gpu
def test_the_pool_places_or_says_why_not() -> None:
    numa.wanted_node.cache_clear()
    node = gpu_node(CUDA)
    assert node is None or node in memory_nodes() or not memory_nodes()
    page = mmap.mmap(-1, mmap.PAGESIZE)
    place_near(CUDA, torch.frombuffer(page, dtype=torch.uint8).data_ptr(), mmap.PAGESIZE)
