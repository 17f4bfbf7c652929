"""`ds-offload plan`, and the same plan before `run` and `summarize` load weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ds_offload.config import OffloadConfig
from ds_offload.machine.published import PUBLISHED

H100 = ("--gpu", "h100", "--host-memory", "200GiB")
GPU = ("weights", "labels", "hot_set", "buffers", "prefill", "reserve", "total")


def plan_json(command: Any, *arguments: str) -> tuple[int, dict[str, Any]]:
    ended = command("plan", *arguments, "--json")
    assert ended.out.count("\n") == 1, ended.err
    return ended.status, json.loads(ended.out)


def test_json(command: Any) -> None:
    status, result = plan_json(command, "--model", "llama-2-7b", "--ctx", "128k", *H100)
    assert status == 0 and result["fits"] is True and result["changes"] == []
    gpu, host = result["gpu"], result["host"]
    assert tuple(gpu) == GPU and set(host) == {"kv", "disk", "total"}
    assert all(type(size) is int and size > 0 for size in (*gpu.values(), host["kv"], host["total"]))
    assert host["disk"] == 0
    parts = sum(gpu[name] for name in GPU[:-1])
    assert parts - min(gpu["prefill"], gpu["hot_set"] + gpu["buffers"]) <= gpu["total"] <= parts
    assert gpu["weights"] == 2 * 6_738_415_616
    assert host["kv"] == host["total"] == 2 * 32 * 32 * 128 * 2 * (1 << 17)
    assert result["gpu_limit"] == PUBLISHED["h100"].memory_bytes and result["host_limit"] == 200 << 30
    assert result["device"] == PUBLISHED["h100"].name
    assert (result["kv_dtype"], result["context"], result["batch"]) == ("bf16", 1 << 17, 1)
    assert type(result["h2d_bytes_per_token"]) is int and result["h2d_bytes_per_token"] > 0
    assert 1 < result["prefill_s"] < 100 and 1 < result["decode_ms_per_token"] < 1000
    assert result["max_context"] >= 1 << 17
    assumed = result["assumptions"]
    assert assumed["hot_set_hit_rate"] == 0.98 and assumed["rows_ahead_per_miss"] == 0
    assert "published" in assumed["bandwidths_from"]
    assert set(result["config"]) == set(OffloadConfig().to_dict())


def test_what_does_not_fit_is_status_1_and_its_changes_make_it_fit(command: Any) -> None:
    asked = ("--model", "llama-2-7b", "--ctx", "128k", "--gpu-memory", "19GiB", "--kv-dtype", "bf16", *H100)
    status, result = plan_json(command, *asked)
    assert status == 1 and result["fits"] is False
    assert result["gpu"]["total"] > result["gpu_limit"] == 19 << 30
    words = [word for flag in result["changes"] for word in flag.split()]
    assert words == ["--kv-dtype", "int8"]
    status, changed = plan_json(command, *asked[:-6], *words, *H100)
    assert status == 0 and changed["fits"] is True
    status, longest = plan_json(command, *asked, "--ctx", str(result["max_context"]))
    assert status == 0 and longest["max_context"] == result["max_context"]
    assert plan_json(command, *asked, "--ctx", str(result["max_context"] + 1))[0] == 1


def test_every_option_of_the_config_counts(command: Any) -> None:
    asked = ("--model", "llama-3.1-8b", "--ctx", "64k", *H100)
    before = plan_json(command, *asked)[1]
    for option, value, part in (
        ("--hot-set", "1", "hot_set"),
        ("--label-channels", "120", "labels"),
        ("--kv-location", "gpu", "buffers"),
        ("--dense-layers", "0,1", "buffers"),
        ("--batch", "2", "labels"),
        ("--dtype", "fp32", "weights"),
    ):
        assert plan_json(command, *asked, option, value)[1]["gpu"][part] != before["gpu"][part], option


def test_a_cpu_has_everything_on_the_host(command: Any, ids_model: str) -> None:
    status, result = plan_json(command, "--model", ids_model, "--device", "cpu", "--ctx", "256")
    assert status == 0
    assert set(result["gpu"].values()) == {0} and result["gpu_limit"] is None
    assert result["host"]["total"] > result["host"]["weights"] + result["host"]["kv"]
    assert result["prefill_s"] is None and result["decode_ms_per_token"] is None
    assert result["assumptions"]["times"].startswith("none: ")
    assert result["device"] == "cpu"


def test_a_dtype_that_is_left_open_is_the_widest_that_fits(command: Any) -> None:
    asked = ("--model", "llama-2-7b", "--ctx", "128k", *H100)
    seen = {}
    for host in ("70GiB", "40GiB", "24GiB", "10GiB"):
        status, result = plan_json(command, *asked, "--host-memory", host)
        assert result["config"]["kv_dtype"] == result["kv_dtype"]
        seen[host] = (status, result["kv_dtype"], result["host"]["kv"])
    row = 131_072 * 32 * 32
    assert seen["70GiB"] == (0, "bf16", row * 512) and seen["40GiB"] == (0, "int8", row * 272)
    assert seen["24GiB"] == (0, "int4", row * 144) and seen["10GiB"] == (1, "int4", row * 144)


def test_for_people(command: Any) -> None:
    fits = command("plan", "--model", "llama-2-7b", "--ctx", "4k", *H100)
    lines = fits.out.splitlines()
    assert fits.status == 0 and fits.err == ""
    assert "4,096 tokens" in lines[0] and PUBLISHED["h100"].name in lines[0]
    assert lines[-1] == "fits"
    assert len(lines) < 25
    short = command("plan", "--model", "llama-2-7b", "--ctx", "512k", "--gpu-memory", "20GiB", *H100)
    last = short.out.splitlines()[-1]
    assert short.status == 1 and last.startswith("does not fit: ") and "; add --" in last
    none = command("plan", "--model", "llama-2-70b", "--gpu", "l4")
    assert none.status == 1 and none.out.splitlines()[-1].endswith("choose a smaller model")


def test_why_there_is_no_time_is_said(command: Any, ids_model: str) -> None:
    ended = command("plan", "--model", ids_model, "--device", "cpu", "--ctx", "256")
    assert "  not estimated: how fast this device is is not known; --gpu NAME takes published figures" in ended.out


def test_positions_beyond_the_trained_ones_are_said_on_stderr(command: Any) -> None:
    ended = command("plan", "--model", "llama-2-7b", "--ctx", "64k", *H100, "--json")
    assert len(ended.error_lines) == 1 and "4,096 positions" in ended.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--model", "llama-9-1b"), ("llama-9-1b", "llama-2-7b")),
        (("--model", "./nowhere"), ("./nowhere", "does not exist")),
        (("--ctx", "many"), ("max_context", "'many'", "256k")),
        (("--ctx", "0"), ("max_context", "at least 1")),
        (("--gpu", "tpu"), ("'tpu'", "h100", "a10g")),
        (("--gpu", "h100", "--device", "cpu"), ("h100", "cpu")),
        (("--gpu-memory", "plenty"), ("gpu_memory", "24GiB")),
        (("--batch", "0"), ("batch", "at least 1")),
        (("--batch", "two"), ("batch", "'two'")),
        (("--batch", "1" + "0" * 30), ("batch", "under 2^53")),
        (("--batch", "65537"), ("batch", "at most 65,536")),
        (("--batch", "65536", "--ctx", str(2**53 - 1)), ("65,536 sequences", "2^53 tokens or more")),
        (("--ctx", "20.7"), ("max_context='20.7'", "is not a whole number")),
        (("--ctx", "1" + "0" * 30), ("max_context", "under 2^53")),
        (("--ctx", "1" + "0" * 320), ("max_context", "under 2^53")),
        (("--ctx", "9" * 5000), ("max_context", "under 2^53")),
        (("--rope-scaling", "yarn:1e300"), ("rope_scaling='yarn:1e300'", "1 to 1,000,000")),
        (("--dense-layers", "99"), ("dense_layers", "99")),
        (("--calibration", "nowhere.safetensors"), ("no calibration nowhere.safetensors",)),
        (("--calibration", __file__), (f"{__file__} is no calibration",)),
    ],
)
def test_refusals(refused: Any, arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    line = refused("plan", *arguments).err
    assert all(word in line for word in words), line


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on loading weights fails."""

    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("ds_offload.preparation.load_weights", load)


@pytest.mark.usefixtures("no_weights")
def test_run_refuses_what_does_not_fit_before_weights_load(refused: Any, ids_model: str) -> None:
    prompt = " ".join(["7"] * 400)
    asked = ("--model", ids_model, "--device", "cpu", "--prompt", prompt, "--max-new-tokens", "100")
    line = refused("run", *asked, "--host-memory", "1MiB", "--segment-tokens", "64").err
    assert "500 tokens need" in line and "host memory" in line and "1.00 MiB are there" in line
    assert "(host_memory); " in line and "at most" in line


@pytest.mark.usefixtures("no_weights")
def test_run_names_the_change(refused: Any, ids_model: str) -> None:
    """Where a smaller answer is enough, it says so."""
    prompt = " ".join(["7"] * 100)
    asked = ("--model", ids_model, "--device", "cpu", "--prompt", prompt, "--segment-tokens", "16")
    asked += ("--max-new-tokens", "400", "--token-budget", "8", "--kv-dtype", "int4", "--label-bits", "2")
    line = refused("run", *asked, "--host-memory", "1650KiB").err
    assert "500 tokens need" in line and "--ctx" in line and "makes it fit" in line


@pytest.mark.usefixtures("no_weights")
def test_summarize_refuses_what_does_not_fit(refused: Any, plain_model: str, tmp_path: Path) -> None:
    file = tmp_path / "long.txt"
    file.write_text("word " * 20, encoding="utf-8")
    asked = ("summarize", str(file), "--words", "10", "--max-new-tokens", "4", "--model", plain_model)
    line = refused(*asked, "--device", "cpu", "--host-memory", "700KiB").err
    assert "tokens need" in line and "host memory" in line


def test_a_prompt_too_long_for_the_gpu_is_streamed(command: Any) -> None:
    asked = ("plan", "--model", "llama-2-7b", "--ctx", "128k", "--hot-set", "1", "--kv-dtype", "bf16", *H100)
    whole, streamed = (json.loads(command(*asked, "--gpu-memory", gpu, "--json").out) for gpu in ("48GiB", "21GiB"))
    assert whole["assumptions"]["prefill_mode"] == "whole" and streamed["assumptions"]["prefill_mode"] == "streamed"
    assert streamed["gpu"]["prefill"] < whole["gpu"]["prefill"] / 2
    # The hidden states.
    assert streamed["host"]["total"] == whole["host"]["total"] + 131_072 * 4096 * 2
    assert "its prefill is streamed" in command(*asked, "--gpu-memory", "21GiB").out
