"""What sysfs and nvidia-smi say about a GPU, from made-up trees and a made-up nvidia-smi."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ds_offload.machine.gpu import Gpu, Link, driver_version, other_processes, pci_id, read_link, smi_values

CUDA = torch.device("cuda", 0)
PCI = "0000:17:00.0"
OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build\nGCC version: 12.3"
CLOSED = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54  Thu Feb 22 01:44:30 UTC 2024\n"


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Makes an nvidia-smi that answers `text` and keeps its arguments."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}/bin{os.pathsep}/usr/bin")

    def make(text: str, status: int = 0) -> Path:
        program = folder / "nvidia-smi"
        program.write_text(f'#!/bin/sh\necho "$@" > {folder}/asked\ncat <<END\n{text}\nEND\nexit {status}\n', "utf-8")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        return folder / "asked"

    return make


@pytest.fixture
def no_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))


def sysfs(root: Path, **files: str) -> Path:
    folder = root / "sys/bus/pci/devices" / PCI
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_text(content + "\n", encoding="ascii")
    return root


@pytest.mark.usefixtures("no_smi")
@pytest.mark.parametrize(
    ("speed", "generation"),
    [
        ("2.5 GT/s PCIe", 1),
        ("16.0 GT/s PCIe", 4),
        ("32.0 GT/s PCIe", 5),
        ("64.0 GT/s", 6),
        ("Unknown", None),
        ("", None),
    ],
)
def test_the_link_by_sysfs(speed: str, generation: int | None, tmp_path: Path) -> None:
    root = sysfs(
        tmp_path, current_link_speed=speed, current_link_width="8", max_link_speed="32.0 GT/s PCIe", max_link_width="16"
    )
    assert read_link(PCI, root) == Link(generation, 8, 5, 16)


@pytest.mark.usefixtures("no_smi")
def test_a_link_that_nothing_tells_is_unknown(tmp_path: Path) -> None:
    assert read_link(None, tmp_path) == read_link(PCI, tmp_path) == Link(None, None, None, None)
    assert driver_version(tmp_path) is None and other_processes(PCI) is None


def test_nvidia_smi_says_what_sysfs_does_not(smi, tmp_path: Path) -> None:
    asked = smi("4, 16, [N/A], 16")
    root = sysfs(tmp_path, current_link_speed="Unknown", current_link_width="63", max_link_width="8")
    assert read_link(PCI, root) == Link(4, 16, None, 8)
    assert f"--id={PCI}" in asked.read_text(encoding="utf-8")


@pytest.mark.parametrize(("text", "status"), [("", 0), ("No devices were found", 6), ("4, 16", 0)])
def test_an_nvidia_smi_that_fails_says_nothing(text: str, status: int, smi, tmp_path: Path) -> None:
    smi(text, status)
    assert read_link(PCI, tmp_path) == Link(None, None, None, None)
    assert smi_values(("name",), PCI) == [None]


@pytest.mark.parametrize(("text", "version"), [(OPEN, "580.159.04"), (CLOSED, "550.54"), ("nothing known", "575.1")])
def test_the_driver_by_its_module_or_by_nvidia_smi(text: str, version: str, smi, tmp_path: Path) -> None:
    smi("575.1")
    folder = tmp_path / "proc/driver/nvidia"
    folder.mkdir(parents=True)
    (folder / "version").write_text(text, encoding="ascii")
    assert driver_version(tmp_path) == version


def test_other_processes_count_where_this_one_is_listed(smi) -> None:
    smi(f"{os.getpid()}, 500\n17, 1024\n18, 3\n19, [N/A]")
    assert other_processes(PCI) == 1027 << 20
    smi(f"{os.getpid()}, 500")
    assert other_processes(None) == 0
    # A container's list is empty, or of another numbering.
    smi("17, 1024")
    assert other_processes(PCI) is None


def test_the_pci_address_is_torchs_or_nvidia_smis(smi, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = smi("00000000:C7:00.0")
    known = SimpleNamespace(pci_domain_id=1, pci_bus_id=0x17, pci_device_id=2, uuid="ab-cd")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: known)
    assert pci_id(CUDA) == "0001:17:02.0"
    del known.pci_bus_id
    assert pci_id(CUDA) == "0000:c7:00.0"
    assert "--id=GPU-ab-cd" in asked.read_text(encoding="utf-8")
    del known.uuid
    assert pci_id(CUDA) is None


@pytest.mark.gpu
def test_this_gpu() -> None:
    gpu = Gpu.of(CUDA)
    assert gpu.name == torch.cuda.get_device_name(0)
    assert 0 < gpu.free_bytes <= gpu.total_bytes
    assert gpu.others_bytes is None or 0 <= gpu.others_bytes <= gpu.total_bytes
    assert gpu.pci is None or len(gpu.pci) == 12
    assert gpu.driver is None or gpu.driver.count(".") >= 1
    assert gpu.link.generation in (None, 1, 2, 3, 4, 5, 6)
