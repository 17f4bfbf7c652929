"""`ds-offload doctor` from end to end: its table, its JSON and its exit status."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_offload.machine import gpu_checks, software_checks
from ds_offload.machine.check import Check

ALWAYS = {
    "python",
    "torch",
    "cuda",
    "driver",
    "triton",
    "transformers",
    "numba",
    "pinned memory",
    "bandwidth",
    "host memory",
    "cgroup",
    "memlock",
    "numa",
    "huge pages",
    "cache folder",
}


def doctor_json(command: Any, *arguments: str) -> tuple[int, dict[str, Any]]:
    ended = command("doctor", "--json", *arguments)
    assert ended.out.count("\n") == 1, "one JSON object and nothing else"
    result = json.loads(ended.out)
    assert set(result) == {"status", "checks"}
    statuses = [check["status"] for check in result["checks"]]
    for check in result["checks"]:
        assert set(check) == {"name", "status", "value", "cure", "figures"} and check["value"]
        assert check["status"] in ("ok", "warn", "fail") and bool(check["cure"]) == (check["status"] != "ok")
        assert "\n" not in check["value"] + check["cure"]
    names = [check["name"] for check in result["checks"]]
    assert len(set(names)) == len(names)
    assert result["status"] == next((one for one in ("fail", "warn") if one in statuses), "ok")
    assert ended.status == ("fail" in statuses)
    return ended.status, result


@pytest.mark.parametrize("quick", [[], ["--quick"]])
def test_on_the_cpu_nothing_fails(quick: list[str], command: Any) -> None:
    status, result = doctor_json(command, "--device", "cpu", *quick)
    assert status == 0
    found = {check["name"]: check for check in result["checks"]}
    assert set(found) >= ALWAYS
    assert "a kernel was compiled and run" in found["numba"]["value"]
    assert "no CUDA device in use" in found["triton"]["value"]
    assert bool(found["bandwidth"]["figures"]) == (not quick)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda_device_is_a_warning(command: Any) -> None:
    status, result = doctor_json(command, "--quick")
    assert status == 0 and result["status"] == "warn"
    (cuda,) = [check for check in result["checks"] if check["name"] == "cuda"]
    assert cuda["status"] == "warn" and cuda["value"].startswith("no CUDA device")


def test_the_table_has_every_check_uncut(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = Check("driver", "warn", "[red]value[/red] " + "x" * 150, "A cure [sic].")
    monkeypatch.setattr(software_checks, "check_driver", lambda device: odd)
    ended = command("doctor", "--device", "cpu", "--quick")
    assert ended.status == 0
    lines = ended.out.splitlines()
    assert {line.split("  ")[0] for line in lines[1:]} >= ALWAYS
    (line,) = [line for line in lines if line.startswith("driver")]
    assert odd.value in line and odd.cure in line and "warn" in line


def test_one_failure_is_status_1(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software_checks, "check_numba", lambda: Check("numba", "fail", "broken", "Mend it."))
    status, result = doctor_json(command, "--device", "cpu", "--quick")
    assert status == 1 and result["status"] == "fail"
    ended = command("doctor", "--device", "cpu", "--quick")
    assert ended.status == 1 and "Mend it." in ended.out


def test_without_torch_the_rest_is_looked_at(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Check("torch", "fail", "ImportError: libcudart.so.13", "Install it again.")
    monkeypatch.setattr(software_checks, "check_torch", lambda: broken)
    status, result = doctor_json(command)
    names = {check["name"] for check in result["checks"]}
    assert status == 1 and {"python", "torch", "host memory", "cache folder"} <= names and "numba" not in names


def test_a_folder_that_cannot_be_a_cache_fails(command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_text("x", encoding="utf-8")
    monkeypatch.setenv("DS_OFFLOAD_CACHE", str(file))
    status, result = doctor_json(command, "--device", "cpu", "--quick")
    assert status == 1 and result["checks"][-1]["name"] == "cache folder"


@pytest.mark.parametrize(
    ("given", "words"),
    [([], "--pin-limit 16GiB"), (["--pin-limit", "1GiB"], "--pin-limit 1GiB"), (["--pin-limit", "900000GiB"], "80%")],
)
def test_the_trial_is_bounded(given: list[str], words: str, command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from ds_offload.machine.host_memory import HostMemory

    got: list[dict[str, Any]] = []

    def checks(device: torch.device, **options: Any) -> list[Check]:
        got.append(options)
        return [Check("pinned memory", "ok", "x", figures={"pinned_bytes": 1 << 20})]

    size = 100 << 30
    memory = HostMemory(size, size, (), 65536, size, "r")
    monkeypatch.setattr(gpu_checks, "gpu_checks", checks)
    monkeypatch.setattr("ds_offload.machine.host_memory.host_memory", lambda: memory)
    _, result = doctor_json(command, "--device", "cpu", *given)
    (options,) = got
    assert options["pin_reason"].startswith(words)
    assert options["pin_limit"] == {"[]": 16 << 30, "1GiB": 1 << 30}.get(given[1] if given else "[]", int(0.8 * size))
    # What the trial found is held against memlock.
    (memlock,) = [check for check in result["checks"] if check["name"] == "memlock"]
    assert memlock["status"] == "ok" and "does not count" in memlock["value"]


def test_ctrl_c_ends_in_one_line(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> Check:
        raise KeyboardInterrupt

    monkeypatch.setattr(software_checks, "check_numba", interrupted)
    ended = command("doctor", "--device", "cpu")
    assert ended.status == 130 and ended.out == ""
    assert ended.error_lines == ["ds-offload: interrupted"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device", "tpu"], "device='tpu'"),
        (["--pin-limit", "lots"], "pin_limit='lots'"),
        (["--pin-limit", "0"], "pin_limit='0'"),
        (["more"], "more"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], words: str, refused: Any) -> None:
    assert words in refused("doctor", *arguments).err


@pytest.mark.gpu
def test_on_the_gpu_everything_is_measured(command: Any) -> None:
    status, result = doctor_json(command, "--pin-limit", "2GiB")
    found = {check["name"]: check for check in result["checks"]}
    assert status == 0, result
    assert found["pinned memory"]["figures"]["pinned_bytes"] > 0
    assert found["bandwidth"]["figures"]["gather_gb_per_s"] > 0
    assert found["managed memory"]["status"] == "ok"
    assert {"gpu memory", "link"} <= set(found)
    _, quick = doctor_json(command, "--quick")
    (kept,) = [check for check in quick["checks"] if check["name"] == "bandwidth"]
    assert kept["figures"] == found["bandwidth"]["figures"] and "before" in kept["value"]
