"""A CUDA device as the system sees it: driver, memory, PCIe link."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ds_offload.machine.command import command_output

# A transfer rate in GT/s and the PCIe generation that has it.
_GENERATIONS = {2.5: 1, 5.0: 2, 8.0: 3, 16.0: 4, 32.0: 5, 64.0: 6}
_WIDTHS = (1, 2, 4, 8, 12, 16, 32)


@dataclass(frozen=True)
class Link:
    """A PCIe link; None for what neither the system nor nvidia-smi says.

    Attributes:
        generation, width: Now. Many GPUs lower the generation while they idle.
        max_generation, max_width: What the device is capable of.
    """

    generation: int | None
    width: int | None
    max_generation: int | None
    max_width: int | None


@dataclass(frozen=True)
class Gpu:
    """What is known about a CUDA device.

    Attributes:
        driver: Version of NVIDIA's driver; None where nothing tells it.
        total_bytes, free_bytes: Device memory.
        others_bytes: Device memory that other processes hold; None where nvidia-smi does not list this
            process itself, as in most containers, so that its list means nothing.
        pci: Such as "0000:17:00.0".
    """

    name: str
    driver: str | None
    total_bytes: int
    free_bytes: int
    others_bytes: int | None
    pci: str | None
    link: Link

    @classmethod
    def of(cls, device: torch.device, root: Path = Path("/")) -> Gpu:
        """The facts about a CUDA device now. Makes its context, if there is none yet."""
        free, total = torch.cuda.mem_get_info(device)
        pci = pci_id(device)
        return cls(
            name=torch.cuda.get_device_name(device),
            driver=driver_version(root),
            total_bytes=total,
            free_bytes=free,
            others_bytes=other_processes(pci),
            pci=pci,
            link=read_link(pci, root),
        )


def pci_id(device: torch.device) -> str | None:
    """The PCI address of a CUDA device, as sysfs writes it; None where torch does not know it."""
    properties = torch.cuda.get_device_properties(device)
    parts: list[Any] = [getattr(properties, name, None) for name in ("pci_domain_id", "pci_bus_id", "pci_device_id")]
    if None not in parts:
        domain, bus, slot = parts
        return f"{domain:04x}:{bus:02x}:{slot:02x}.0"
    uuid = getattr(properties, "uuid", None)
    answer = None if uuid is None else smi_values(("pci.bus_id",), f"GPU-{uuid}")[0]
    # nvidia-smi writes the domain with eight digits.
    return None if answer is None else answer.lower()[-12:]


def pci_number(pci: str, name: str, root: Path = Path("/")) -> int | None:
    """A whole number that sysfs has about a PCI device; None where it has none."""
    try:
        return int((root / "sys/bus/pci/devices" / pci / name).read_text(encoding="ascii").strip())
    except (OSError, ValueError):
        return None


def read_link(pci: str | None, root: Path = Path("/")) -> Link:
    """The link of the device at `pci`: from sysfs, and from nvidia-smi what sysfs does not say."""
    values: list[int | None] = [None] * 4
    if pci is not None:
        values = [
            _generation(pci, "current_link_speed", root),
            _width(pci_number(pci, "current_link_width", root)),
            _generation(pci, "max_link_speed", root),
            _width(pci_number(pci, "max_link_width", root)),
        ]
    if None in values:
        names = ("pcie.link.gen.current", "pcie.link.width.current", "pcie.link.gen.max", "pcie.link.width.max")
        asked = [int(text) if text is not None and text.isdigit() else None for text in smi_values(names, pci)]
        values = [asked[n] if value is None else value for n, value in enumerate(values)]
    return Link(*values)


def driver_version(root: Path = Path("/")) -> str | None:
    """Version of NVIDIA's driver, from its kernel module or nvidia-smi; None where there is none."""
    try:
        text = (root / "proc/driver/nvidia/version").read_text(encoding="ascii", errors="replace")
    except OSError:
        text = ""
    found = re.search(r"Module.*?\s(\d+\.\d+(?:\.\d+)?)\s", text)
    return found[1] if found else smi_values(("driver_version",))[0]


def other_processes(pci: str | None) -> int | None:
    """Bytes of device memory that processes other than this one hold; None where that cannot be told."""
    query = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    answer = command_output(*query, *([] if pci is None else [f"--id={pci}"]))
    rows = [line.split(",") for line in (answer or "").splitlines()]
    held = {int(pid): int(mib) << 20 for pid, mib in rows if pid.strip().isdigit() and mib.strip().isdigit()}
    if os.getpid() not in held:
        return None
    return sum(held.values()) - held[os.getpid()]


def smi_values(names: tuple[str, ...], device: str | None = None) -> list[str | None]:
    """What nvidia-smi answers for each name; None where it is not installed or does not know.

    Args:
        device: A PCI address or "GPU-" and a UUID; None is the first GPU.
    """
    query = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits"]
    lines = (command_output(*query, *([] if device is None else [f"--id={device}"])) or "").splitlines()
    values = [text.strip() for text in lines[0].split(",")] if lines else []
    if len(values) != len(names):
        return [None] * len(names)
    return [None if not text or text.startswith("[") or text in ("N/A", "Unknown") else text for text in values]


def _generation(pci: str, name: str, root: Path) -> int | None:
    try:
        text = (root / "sys/bus/pci/devices" / pci / name).read_text(encoding="ascii").split()[0]
        return _GENERATIONS.get(float(text))
    except (OSError, ValueError, IndexError):
        return None


def _width(lanes: int | None) -> int | None:
    """Virtual machines report widths that do not exist."""
    return lanes if lanes in _WIDTHS else None
