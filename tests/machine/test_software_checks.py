"""The software's checks where it works, where it is broken and where it is not installed."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch

from ds_offload.machine import software_checks as software
from ds_offload.machine.check import Check, attempt, worst

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def test_what_the_tests_run_on_works() -> None:
    for check in (
        software.check_python(),
        software.check_torch(),
        software.check_transformers(),
        software.check_numba(),
    ):
        assert check.status == "ok" and check.value and check.cure == ""
    assert torch.__version__ in software.check_torch().value
    assert "a kernel was compiled and run" in software.check_numba().value


@pytest.mark.parametrize(
    ("module", "check"),
    [
        ("torch", software.check_torch),
        ("transformers.models.llama.modeling_llama", software.check_transformers),
    ],
)
def test_a_package_that_does_not_import_fails_with_its_cure(
    module: str, check: Callable[[], Check], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    found = check()
    assert found.status == "fail" and f"import of {module} halted" in found.value
    assert f"pip install --force-reinstall '{module.split('.')[0]}" in found.cure


def test_a_kernel_with_wrong_numbers_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ds_offload.kernels.gather.gather_rows", lambda table, layer, tokens, slots, out: out)
    found = software.check_numba()
    assert found.status == "fail" and "wrong rows" in found.value and "numba" in found.cure


def test_another_major_version_of_transformers_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software, "installed", lambda package: "6.1.0")
    found = software.check_transformers()
    assert found.status == "warn" and "6.1.0" in found.value and "<6" in found.cure


@pytest.mark.parametrize(
    ("built_for", "there", "status", "words"),
    [
        (None, False, "warn", "build of torch for CUDA"),
        ("13.0", False, "warn", "nvidia-smi"),
        ("13.0", True, "ok", ""),
    ],
)
def test_no_cuda_device_is_a_warning(
    built_for: str | None, there: bool, status: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", built_for)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    found = software.check_cuda(CPU)
    assert found.status == status and words in found.cure
    assert ("no CUDA device" in found.value) == (not there)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_gpu_that_does_not_compute_fails() -> None:
    assert software.check_cuda(CUDA).status == software.check_triton(CUDA).status == "fail"


def test_the_interpreter_is_no_proof_of_triton() -> None:
    found = software.check_triton(CPU)
    assert found.status == "ok" and "not tried: no CUDA device" in found.value


def test_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ds_offload.machine.gpu.driver_version", lambda: None)
    assert software.check_driver(CPU).status == "warn"
    assert software.check_driver(CUDA).status == "ok" and "unknown" in software.check_driver(CUDA).value
    monkeypatch.setattr("ds_offload.machine.gpu.driver_version", lambda: "580.1")
    assert software.check_driver(CPU) == Check("driver", "ok", "580.1")


def test_cupy_is_looked_at_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software, "installed", lambda package: None)
    assert software.check_cupy(CUDA) is None
    monkeypatch.setattr(software, "installed", lambda package: "14.0" if package == "cupy-cuda13x" else None)
    monkeypatch.setitem(sys.modules, "cupy", None)
    found = software.check_cupy(CUDA)
    assert found is not None and found.status == "warn" and "nothing here needs it" in found.cure
    found = software.check_cupy(CPU)
    assert found is not None and found.status == "ok" and "14.0" in found.value


def test_an_attempt_is_one_line() -> None:
    def fail() -> str:
        raise OSError("a\n  b" + "c" * 1000)

    found = attempt("x", fail, "do this", "warn")
    assert found.status == "warn" and found.value.startswith("OSError: a bccc") and len(found.value) < 400
    assert attempt("x", lambda: "1.0", "do this") == Check("x", "ok", "1.0")


def test_the_worst_status() -> None:
    def of(*statuses: str) -> str:
        return worst([Check("x", status, "") for status in statuses])

    assert of() == of("ok", "ok") == "ok" and of("ok", "warn") == "warn" and of("fail", "warn", "ok") == "fail"


@pytest.mark.gpu
def test_the_gpus_software_works() -> None:
    for check in (software.check_cuda(CUDA), software.check_driver(CUDA), software.check_triton(CUDA)):
        assert check.status == "ok", check
    assert "a kernel was compiled and run" in software.check_triton(CUDA).value
