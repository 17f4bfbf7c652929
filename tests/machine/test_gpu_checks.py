"""The GPU's checks over made-up facts: what is a warning, what fails, and what is measured."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from ds_offload.errors import MemoryPlanError
from ds_offload.machine import gpu_checks as checks
from ds_offload.machine.bandwidth import Bandwidths
from ds_offload.machine.gpu import Gpu, Link
from ds_offload.machine.pin_probe import PinProbe

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
GIB = 1 << 30
ORDER = ["gpu memory", "managed memory", "pinned memory", "bandwidth", "link"]
GPU = Gpu("H100", "580", 80 * GIB, 79 * GIB + GIB // 2, 0, "0000:17:00.0", Link(5, 16, 5, 16))
RATES = Bandwidths(50.0, 49.0, 44.0, 2900.0)


def facts(**changes: Any) -> Gpu:
    return replace(GPU, **changes)


@pytest.mark.parametrize(
    ("changes", "status", "words"),
    [
        ({}, "ok", "79.50 of 80.00 GiB"),
        ({"others_bytes": 3 * GIB, "free_bytes": 70 * GIB}, "warn", "other processes hold 3.00 GiB"),
        # Taken by this process itself.
        ({"others_bytes": 0, "free_bytes": 20 * GIB}, "ok", "20.00"),
        ({"others_bytes": None, "free_bytes": 20 * GIB}, "warn", "20.00"),
        ({"others_bytes": None}, "ok", "79.50"),
    ],
)
def test_gpu_memory(changes: dict[str, Any], status: str, words: str) -> None:
    found = checks.check_gpu_memory(facts(**changes))
    assert found.status == status and words in found.value and bool(found.cure) == (status != "ok")


@pytest.mark.parametrize(
    ("link", "status", "words"),
    [
        (Link(5, 16, 5, 16), "ok", "PCIe 5 x16"),
        (Link(1, 16, 4, 16), "ok", "PCIe 1 x16, the GPU is capable of PCIe 4"),
        (Link(4, 8, 4, 16), "warn", "PCIe 4 x8, the GPU is capable of x16"),
        (Link(4, 8, None, None), "ok", "PCIe 4 x8"),
        (Link(None, 16, 5, 16), "ok", "unknown"),
    ],
)
def test_link(link: Link, status: str, words: str) -> None:
    found = checks.check_link(facts(link=link))
    assert found.status == status and words in found.value and bool(found.cure) == (status != "ok")
    assert found.figures["width"] == link.width


@pytest.mark.parametrize(
    ("pinned", "refusal", "status"), [(GIB, None, "ok"), (GIB, "refused", "warn"), (0, "refused", "fail")]
)
def test_pinned_memory(pinned: int, refusal: str | None, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "probe_pinned", lambda device, limit: PinProbe(pinned, refusal))
    found = checks.check_pinned(CUDA, 2 * GIB, "a reason", quick=False)
    assert found.status == status and f"{pinned / GIB:.2f} GiB" in found.value
    assert found.figures == {"pinned_bytes": pinned, "limit_bytes": 2 * GIB}
    assert ("a reason" in found.value) == (refusal is None) and ("ulimit -l" in found.cure) == (status != "ok")


def test_managed_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks.managed_memory, "supported", lambda device: True)
    assert checks.check_managed(CUDA).status == "ok"
    monkeypatch.setattr(checks.managed_memory, "supported", lambda device: False)
    found = checks.check_managed(CUDA)
    assert found.status == "warn" and "page-locked" in found.value and "12.2" in found.cure


def test_quick_measures_and_locks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("probe_pinned", "measure_bandwidths", "measure_limits"):
        monkeypatch.setattr(checks, name, lambda *_: pytest.fail("quick"))
    assert "--quick" in checks.check_pinned(CUDA, GIB, "", quick=True).value
    monkeypatch.setattr(checks, "measured_bandwidths", lambda device: None)
    assert "not measured yet" in checks.check_bandwidths(CUDA, quick=True).value
    monkeypatch.setattr(checks, "measured_bandwidths", lambda device: RATES)
    found = checks.check_bandwidths(CUDA, quick=True)
    assert "50.0 GB/s to the GPU" in found.value and "before" in found.value
    assert all("--quick" in check.value or "not tried" in check.value for check in on_cpu(quick=True))


def on_cpu(quick: bool) -> list[Any]:
    return list(checks.gpu_checks(CPU, pin_limit=GIB, pin_reason="", quick=quick))


def test_a_cpu_measures_its_memory() -> None:
    pinned, bandwidth = on_cpu(quick=False)
    assert pinned.status == bandwidth.status == "ok" and "no CUDA device" in pinned.value
    assert bandwidth.figures["link_bytes_per_s"] > 0


@pytest.mark.parametrize(
    ("outcome", "status"),
    [
        (RATES, "ok"),
        (replace(RATES, gather_gb_per_s=20.0), "warn"),
        (MemoryPlanError("refused"), "fail"),
        (RuntimeError("CUDA out of memory"), "fail"),
    ],
)
def test_bandwidths(outcome: Any, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(device: torch.device) -> Bandwidths:
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(checks, "measure_bandwidths", measure)
    found = checks.check_bandwidths(CUDA, quick=False)
    assert found.status == status and bool(found.cure) == (status != "ok")
    if isinstance(outcome, Bandwidths):
        assert found.figures == outcome.to_dict()


def test_all_of_a_gpus_checks_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Gpu, "of", classmethod(lambda cls, device: GPU))
    monkeypatch.setattr(checks, "probe_pinned", lambda device, limit: PinProbe(limit, None))
    monkeypatch.setattr(checks, "measure_bandwidths", lambda device: RATES)
    monkeypatch.setattr(checks.managed_memory, "supported", lambda device: True)
    found = list(checks.gpu_checks(CUDA, pin_limit=GIB, pin_reason="r", quick=False))
    assert [check.name for check in found] == ORDER
    assert {check.status for check in found} == {"ok"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_gpu_that_does_not_answer_fails_once() -> None:
    (found,) = checks.gpu_checks(CUDA, pin_limit=GIB, pin_reason="", quick=False)
    assert found.name == "gpu memory" and found.status == "fail" and found.cure


@pytest.mark.gpu
def test_this_gpu(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_OFFLOAD_CACHE", str(tmp_path))
    found = list(checks.gpu_checks(CUDA, pin_limit=GIB, pin_reason="r", quick=False))
    assert [check.name for check in found] == ORDER
    assert "fail" not in {check.status for check in found}
    assert found[2].figures["pinned_bytes"] == GIB
