"""Where a benchmark ran: device, versions and commit."""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

import ds_offload
from ds_offload.machine.command import command_output
from ds_offload.machine.gpu import driver_version

PACKAGES = ("torch", "triton", "transformers")


@dataclass(frozen=True)
class Environment:
    """What a row's figures depend on besides the code of its benchmark.

    Attributes:
        device: The GPU's name, or "cpu", its model and the threads torch uses.
        versions: By name: python, ds_offload, torch, triton, transformers, cuda and driver; None
            where there is none.
        commit: Git commit of the source tree, "-dirty" behind it where files differ from it;
            None where the package is not run from a git tree.
    """

    device: str
    versions: dict[str, str | None]
    commit: str | None

    @classmethod
    def of(cls, device: torch.device) -> Environment:
        """The environment of this process, computing on `device`."""
        versions: dict[str, str | None] = {"python": platform.python_version(), "ds_offload": ds_offload.__version__}
        versions |= {name: _version(name) for name in PACKAGES}
        versions |= {"cuda": torch.version.cuda, "driver": driver_version() if device.type == "cuda" else None}
        return cls(device_name(device), versions, tree_commit(Path(ds_offload.__file__).resolve().parent.parent))


def device_name(device: torch.device) -> str:
    """What to call `device` in a report."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({_cpu_model()}, {torch.get_num_threads()} threads)"


def tree_commit(root: Path) -> str | None:
    """The commit of the git tree whose top is `root`, with "-dirty" behind it; None where it is no such tree."""
    top = command_output("git", "-C", str(root), "rev-parse", "--show-toplevel")
    # An installed package may lie in an environment that lies in somebody else's tree.
    if not top or not os.path.samefile(top, root):
        return None
    commit = command_output("git", "-C", str(root), "rev-parse", "HEAD")
    if not commit:
        return None
    return commit if command_output("git", "-C", str(root), "status", "--porcelain") == "" else f"{commit}-dirty"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    if sys.platform == "linux":
        try:
            lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        except OSError:
            lines = []
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        if names:
            return names[0]
    return platform.processor() or platform.machine()
