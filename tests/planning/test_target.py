"""Which device a plan is for, and whose memory counts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ds_offload.config import OffloadConfig
from ds_offload.errors import InputError
from ds_offload.machine.published import PUBLISHED
from ds_offload.memory_check import memory_limits
from ds_offload.planning.target import find_target, published_gpu

GIB = 2**30


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_a_gpu_by_name() -> None:
    target = find_target(OffloadConfig(host_memory="900GiB"), "auto", "H100")
    assert target.cuda and target.name == PUBLISHED["h100"].name
    # Another machine's host, taken at its word.
    assert target.limits.gpu == PUBLISHED["h100"].memory_bytes and target.limits.host == 900 * GIB
    assert target.rates is not None and "published" in target.rates.bandwidths_from
    lower = find_target(OffloadConfig(gpu_memory="8GiB"), "auto", "h100")
    assert lower.limits.gpu == 8 * GIB
    assert lower.limits.host == pytest.approx(memory_limits(OffloadConfig(), torch.device("cpu")).host, rel=0.2)
    assert find_target(OffloadConfig(gpu_memory="800GiB"), "auto", "l4").limits.gpu == PUBLISHED["l4"].memory_bytes


def test_a_gpu_by_its_memory_alone() -> None:
    target = find_target(OffloadConfig(gpu_memory="24GiB", host_memory="1TiB"), "auto", None)
    assert target.cuda and target.rates is None
    assert (target.limits.gpu, target.limits.host) == (24 * GIB, 1024 * GIB)
    assert find_target(OffloadConfig(gpu_memory="24GiB"), "cuda", None).cuda


def test_this_cpu() -> None:
    for device in ("auto", "cpu"):
        target = find_target(OffloadConfig(host_memory="1MiB"), device, None)
        assert not target.cuda and target.limits.gpu is None and target.rates is None
        assert target.limits.host == 1 << 20
    assert not find_target(OffloadConfig(gpu_memory="24GiB"), "cpu", None).cuda


@pytest.mark.parametrize(
    ("device", "gpu", "words"),
    [
        ("auto", "h1000", ("h1000", "h100", "rtx4090")),
        ("cpu", "h100", ("h100", "cpu")),
        ("cuda", None, ("cuda", "--device cpu")),
    ],
)
def test_refusals(device: str, gpu: str | None, words: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as error:
        find_target(OffloadConfig(), device, gpu)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA GeForce RTX 3090", "rtx3090"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA A10G", "a10g"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA GeForce RTX 5090", "rtx5090"),
        ("NVIDIA L40", None),
        ("NVIDIA GeForce RTX 4080", None),
    ],
)
def test_published_figures_by_the_driver_s_name(name: str, key: str | None) -> None:
    assert published_gpu(name) is (None if key is None else PUBLISHED[key])


@pytest.mark.parametrize("measured", [None, SimpleNamespace(gather_gb_per_s=45.0, memory_gb_per_s=3000.0)])
def test_a_device_that_is_here(monkeypatch: pytest.MonkeyPatch, measured: Any) -> None:
    free = 10 * GIB
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: GIB)
    monkeypatch.setattr("ds_offload.planning.target.measured_bandwidths", lambda device: measured)
    target = find_target(OffloadConfig(), "auto", None)
    # What torch holds unused is free, too.
    assert target.cuda and target.limits.gpu == free + 2 * GIB
    assert find_target(OffloadConfig(gpu_memory="4GiB"), "auto", None).limits.gpu == 4 * GIB
    assert find_target(OffloadConfig(gpu_memory="40GiB"), "auto", None).limits.gpu == free + 2 * GIB
    assert target.rates is not None and target.rates.bf16_tflops == PUBLISHED["h100"].bf16_tflops
    assert target.rates.link_gb_per_s == (PUBLISHED["h100"].link_gb_per_s if measured is None else 45.0)
    assert ("measured" in target.rates.bandwidths_from) is (measured is not None)


@pytest.mark.gpu
def test_a_real_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    target = find_target(OffloadConfig(), "cuda", None)
    assert target.cuda and target.limits.gpu is not None
    assert 0 < target.limits.gpu <= torch.cuda.get_device_properties(0).total_memory
