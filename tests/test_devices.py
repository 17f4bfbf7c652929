"""Which device computes: what is there, and what it must be able to do."""

from __future__ import annotations

import pytest
import torch

from ds_offload.devices import find_device, resolve_device, unusable
from ds_offload.errors import InputError
from ds_offload.machine.check import Check
from ds_offload.machine.software_checks import check_cuda

CUDA = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Makes torch see a Tesla T4."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.version, "hip", None)
    return monkeypatch


@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:0"])
def test_a_gpu_that_is_too_old_is_refused_in_one_line(gpu: pytest.MonkeyPatch, name: str) -> None:
    line = r"Tesla T4 has compute capability 7\.5, and 8\.0 is needed \(A100, RTX 30 or newer\); use --device cpu"
    with pytest.raises(InputError, match=f"^{line}$"):
        resolve_device(name)
    assert find_device(name) == CUDA and resolve_device("cpu").type == "cpu"


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (12, 0)])
def test_newer_ones_are_taken(gpu: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    gpu.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert resolve_device("auto") == CUDA and unusable(CUDA) is None


def test_a_build_of_torch_for_other_gpus_is_refused(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(torch.version, "hip", "7.0")
    gpu.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
    with pytest.raises(
        InputError, match="this build of torch is for AMD's GPUs, and the kernels are for NVIDIA's; use"
    ):
        resolve_device("auto")


def test_the_doctor_says_so(gpu: pytest.MonkeyPatch) -> None:
    found = Check("cuda", "ok", "13.0, Tesla T4")
    gpu.setattr("ds_offload.machine.software_checks.attempt", lambda name, work, cure: found)
    check = check_cuda(CUDA)
    assert check.status == "fail" and "compute capability 7.5" in check.value and "--device cpu" in (check.cure or "")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("cuda:1", "there are 1 CUDA devices, numbered from 0"),
        ("gpu", "unknown; use auto"),
        ("mps", "unknown; use auto"),
    ],
)
def test_names_that_are_refused(gpu: pytest.MonkeyPatch, name: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        resolve_device(name)
