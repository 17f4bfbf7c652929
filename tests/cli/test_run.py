"""`ds-offload run` from end to end on tiny random models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import AutoTokenizer

from ds_offload.config import OffloadConfig
from ds_offload.generator import OffloadedGenerator

IDS = " ".join(str(7 * i % 300) for i in range(1, 41))
CPU = ("--device", "cpu")
STATS = (
    "prefill_s",
    "decode_ms_per_token",
    "h2d_bytes_per_token",
    "hot_set_hit_rate",
    "prefetch_recall",
    "gpu_peak_bytes",
    "host_pinned_bytes",
)


def run_json(command: Any, *arguments: str, stdin: bytes | None = None) -> dict[str, Any]:
    ended = command("run", *CPU, *arguments, "--json", stdin=stdin)
    assert ended.status == 0, ended.err
    assert ended.out.count("\n") == 1, "one JSON object and nothing else"
    return json.loads(ended.out)


def test_token_ids_in_and_out(command: Any, ids_model: str) -> None:
    """A folder without a tokenizer: the same tokens as the Python API gives, by every way in."""
    with OffloadedGenerator.from_pretrained(ids_model, device="cpu") as generator:
        expected = generator.generate([int(token) for token in IDS.split()], max_new_tokens=12)
    result = run_json(command, "--model", ids_model, "--prompt", IDS, "--max-new-tokens", "12")
    assert result["token_ids"] == expected.token_ids
    assert result["text"] == " ".join(map(str, expected.token_ids))
    assert (result["prompt_tokens"], result["new_tokens"], result["finish_reason"]) == (40, 12, "length")
    assert set(STATS) <= set(result["stats"])
    streamed = command("run", *CPU, "--model", ids_model, "--max-new-tokens", "12", stdin=IDS.encode())
    assert streamed.out == result["text"] + "\n"
    assert "prompt 40 tokens" in streamed.error_lines[-1] and "12 new tokens" in streamed.error_lines[-1]


def test_config_as_resolved(command: Any, ids_model: str) -> None:
    result = run_json(
        command, "--model", ids_model, "--prompt", IDS, "--max-new-tokens", "2", "--token-budget", "8", "--ctx", "256"
    )
    config = result["config"]
    assert (config["token_budget"], config["max_context"], config["kv_dtype"]) == ("8", 256, "fp32")
    assert (config["label_code"], config["label_channels"], config["label_bits"]) == ("product", 32, None)
    assert set(config) == set(OffloadConfig().to_dict())


def test_the_context_is_the_trained_one_by_default(command: Any, ids_model: str) -> None:
    assert (
        run_json(command, "--model", ids_model, "--prompt", IDS, "--max-new-tokens", "1")["config"]["max_context"]
        == 512
    )


def test_text_from_prompt_file_and_pipe(command: Any, plain_model: str, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("Call me Ishmael. 🐋", encoding="utf-8")
    common = ("--model", plain_model, "--max-new-tokens", "8")
    by_option = run_json(command, *common, "--prompt", "Call me Ishmael. 🐋")
    by_file = run_json(command, *common, "--prompt-file", str(file))
    by_pipe = run_json(command, *common, stdin=file.read_bytes())
    by_dash = run_json(command, *common, "--prompt-file", "-", stdin=file.read_bytes())
    assert by_option["prompt_tokens"] == len(file.read_bytes())
    assert by_option["token_ids"] == by_file["token_ids"] == by_pipe["token_ids"] == by_dash["token_ids"]
    tokenizer = AutoTokenizer.from_pretrained(plain_model)
    assert by_option["text"] == tokenizer.decode(by_option["token_ids"], skip_special_tokens=True)


@pytest.mark.parametrize("with_template", [True, False])
def test_a_question_about_a_document(command: Any, chat_model: str, plain_model: str, with_template: bool) -> None:
    result = run_json(
        command,
        *("--model", chat_model if with_template else plain_model),
        *("--prompt", "A book.", "--question", "Who?", "--max-new-tokens", "2"),
    )
    prompt = "<user>A book.\n\nWho?\n<assistant>" if with_template else "A book.\n\nQuestion: Who?\nAnswer:"
    assert result["prompt_tokens"] == len(prompt)


def test_chat(command: Any, chat_model: str) -> None:
    result = run_json(command, "--model", chat_model, "--prompt", "Hi", "--chat", "--max-new-tokens", "2")
    assert result["prompt_tokens"] == len("<user>Hi\n<assistant>")


def test_sampling_flags(command: Any, plain_model: str) -> None:
    def draw(*flags: str) -> list[int]:
        common = ("--model", plain_model, "--prompt", "Call me", "--max-new-tokens", "16")
        return run_json(command, *common, *flags)["token_ids"]

    greedy = draw()
    warm = ("--temperature", "1.5", "--top-k", "50", "--top-p", "0.95", "--min-p", "0.01")
    assert draw("--temperature", "0") == greedy
    assert draw(*warm, "--seed", "1") == draw(*warm, "--seed", "1") != draw(*warm, "--seed", "2")
    assert draw("--temperature", "1", "--top-k", "1") == greedy
    assert draw("--repetition-penalty", "1.5") != greedy


def test_stop_strings(command: Any, plain_model: str) -> None:
    common = ("--model", plain_model, "--prompt", "Call me", "--max-new-tokens", "24")
    text = run_json(command, *common)["text"]
    first, second = text[3], text[8:10]
    result = run_json(command, *common, "--stop", second, "--stop", first)
    assert result["text"] == text[: min(text.index(first), text.index(second))]
    assert result["finish_reason"] == "stop" and result["new_tokens"] < 24
    streamed = command("run", *CPU, *common, "--stop", second, "--stop", first)
    assert streamed.out == result["text"] + ("" if result["text"].endswith("\n") else "\n")


def wrong_inputs() -> dict[str, tuple[list[str], str]]:
    """Arguments (MODEL stands for a model's folder) and words of the line they end in."""
    prompt = ["--prompt", IDS]
    model = ["--model", "MODEL"]
    return {
        "unknown model": (["--model", "no-such-model", *prompt], "no-such-model"),
        "no folder": (["--model", "./no-such-folder", *prompt], "no-such-folder"),
        "empty model": (["--model", "", *prompt], "model"),
        "missing file": ([*model, "--prompt-file", "missing.txt"], "'missing.txt' does not exist"),
        "empty prompt": ([*model, "--prompt", ""], "--prompt is empty"),
        "blank prompt": ([*model, "--prompt", " \n"], "--prompt has only white space"),
        "no prompt": (model, "no prompt was given"),
        "two prompts": ([*model, *prompt, "--prompt-file", "x"], "--prompt and --prompt-file"),
        "empty question": ([*model, *prompt, "--question", " "], "--question is empty"),
        "prompt longer than the context": ([*model, *prompt, "--ctx", "40"], "40 tokens and max_context=40"),
        "budget 0": ([*model, *prompt, "--token-budget", "0"], "token_budget='0'"),
        "budget over 1": ([*model, *prompt, "--token-budget", "1.5"], "token_budget='1.5'"),
        "too many label channels": ([*model, *prompt, "--label-channels", "33"], "label_channels=33"),
        "bits not in the list": ([*model, *prompt, "--label-bits", "3"], "label_bits=3"),
        "a size like 256q": ([*model, *prompt, "--ctx", "256q"], "max_context='256q'"),
        "a layer too many": ([*model, *prompt, "--dense-layers", "0,3"], "dense_layers=3"),
        "no such calibration": ([*model, *prompt, "--calibration", "missing.safetensors"], "missing.safetensors"),
        "no such device": ([*model, *prompt, "--device", "tpu"], "device='tpu'"),
        "no such dtype": ([*model, *prompt, "--dtype", "fp8"], "fp8"),
        "no such format": ([*model, *prompt, "--load-format", "pickle"], "pickle"),
        "too few tokens to trace": (
            [*model, *prompt, "--trace", "t.json", "--max-new-tokens", "4"],
            "begins at the answer's token 5",
        ),
        "a checkpoint in a file": (
            [*model, *prompt, "--checkpoint", __file__],
            "cannot write to the checkpoint folder",
        ),
        "no such scaling": ([*model, *prompt, "--rope-scaling", "stretch"], "stretch"),
        "no ids": ([*model, "--prompt", "Call me"], "'Call' is not a token id"),
        "an id too large": ([*model, "--prompt", "1 300"], "token id 300"),
        "question without tokenizer": ([*model, *prompt, "--question", "Who?"], "--question needs a tokenizer"),
        "chat without tokenizer": ([*model, *prompt, "--chat"], "--chat needs a tokenizer"),
        "stop without tokenizer": ([*model, *prompt, "--stop", "5"], "needs a tokenizer"),
        "empty stop": ([*model, *prompt, "--stop", ""], "stop="),
        "temperature": ([*model, *prompt, "--temperature", "-1"], "temperature=-1.0"),
        "no temperature": ([*model, *prompt, "--temperature", "warm"], "temperature='warm'"),
        "top-k": ([*model, *prompt, "--top-k", "2.5"], "top_k='2.5'"),
        "top-p": ([*model, *prompt, "--top-p", "0"], "top_p=0.0"),
        "seed": ([*model, *prompt, "--seed", "-1"], "seed=-1"),
        "no new tokens": ([*model, *prompt, "--max-new-tokens", "0"], "max_new_tokens='0'"),
        "trace in no folder": ([*model, *prompt, "--trace", "no/where.json"], "trace=no/where.json is in no"),
        "trace that is a folder": ([*model, *prompt, "--trace", "/"], "trace=/ is a folder"),
        "unknown option": ([*model, *prompt, "--budget", "8"], "--budget"),
        "option without value": ([*model, "--prompt"], "--prompt"),
        "extra argument": ([*model, *prompt, "more"], "more"),
    }


@pytest.mark.parametrize("case", wrong_inputs())
def test_wrong_input_is_one_line(refused: Any, ids_model: str, case: str) -> None:
    arguments, words = wrong_inputs()[case]
    arguments = [ids_model if argument == "MODEL" else argument for argument in arguments]
    device = () if "--device" in arguments else CPU
    assert words in refused("run", *device, *arguments).err


def test_files_that_are_no_text(refused: Any, ids_model: str, tmp_path: Path) -> None:
    binary, empty = tmp_path / "binary.bin", tmp_path / "empty.txt"
    binary.write_bytes(bytes(range(256)))
    empty.touch()
    for path, words in ((binary, "is binary"), (empty, "is empty"), (tmp_path, "is a folder")):
        line = refused("run", *CPU, "--model", ids_model, "--prompt-file", str(path)).err
        assert words in line and str(path) in line
    assert "binary" in refused("run", *CPU, "--model", ids_model, stdin=b"1 2\0").err
    assert "is empty" in refused("run", *CPU, "--model", ids_model, stdin=b"").err


def test_cheap_checks_come_before_the_weights(refused: Any, ids_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("the weights were loaded")

    monkeypatch.setattr("ds_offload.preparation.load_weights", never)
    for arguments in (["--label-channels", "33"], ["--top-p", "7"], ["--stop", ""], ["--dense-layers", "9"]):
        refused("run", *CPU, "--model", ids_model, "--prompt", IDS, *arguments)


def test_a_calibration_of_another_model(
    command: Any, refused: Any, chat_model: str, plain_model: str, tmp_path: Path
) -> None:
    file = tmp_path / "other.safetensors"
    made = command("calibrate", *CPU, "--model", plain_model, "--out", str(file))
    assert made.status == 0, made.err
    used = ("run", *CPU, "--prompt", "Call me", "--max-new-tokens", "2", "--calibration", str(file))
    assert command(*used, "--model", plain_model).status == 0
    assert str(file) in refused(*used, "--model", chat_model).err


def test_a_calibration_without_codes_gives_scalar_labels_and_is_said(
    command: Any, refused: Any, plain_model: str, tmp_path: Path
) -> None:
    file = tmp_path / "mine.safetensors"
    assert command("calibrate", *CPU, "--model", plain_model, "--out", str(file)).status == 0
    tensors = safetensors.torch.load_file(file)
    with safetensors.safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("code_")}
    safetensors.torch.save_file(kept, file, metadata | {"version": "2"})
    used = ("run", *CPU, "--model", plain_model, "--prompt", "Call me", "--max-new-tokens", "2")
    out = command(*used, "--calibration", str(file), "--json")
    assert out.status == 0 and f"bit: the calibration {file} has no product codes" in out.err
    assert json.loads(out.out)["config"]["label_code"] == "scalar"
    asked = command(*used, "--calibration", str(file), "--label-bits", "4")
    assert asked.status == 0 and "has no product codes" not in asked.err
    line = refused(*used, "--calibration", str(file), "--label-code", "product").err
    assert "label_code='product' needs a calibration with codes" in line and str(file) in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_one(refused: Any, ids_model: str) -> None:
    assert "device='cuda'" in refused("run", "--model", ids_model, "--prompt", IDS, "--device", "cuda").err


def test_chat_without_a_template(refused: Any, command: Any, plain_model: str) -> None:
    common = ("run", *CPU, "--model", plain_model, "--prompt", "Hi")
    assert command(*common, "--max-new-tokens", "1").status == 0  # calibrated from here on
    assert "--chat needs a chat template" in refused(*common, "--chat").err


def subprocess_run(arguments: list[str], **options: Any) -> subprocess.CompletedProcess[bytes]:
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, timeout=120, check=False, **options
    )


def test_as_a_process(ids_model: str) -> None:
    common = ["-m", "ds_offload", "run", *CPU, "--model", ids_model, "--max-new-tokens", "3"]
    done = subprocess_run([*common, "--json"], input=IDS.encode())
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["token_ids"]) == 3
    wrong = subprocess_run([*common, "--token-budget", "0"], input=IDS.encode())
    assert (wrong.returncode, wrong.stdout) == (2, b"")
    assert wrong.stderr.startswith(b"ds-offload: error: token_budget='0'") and wrong.stderr.count(b"\n") == 1


def test_a_trace_does_not_replace_the_prompt(refused: Any, ids_model: str, tmp_path: Path) -> None:
    prompt, link = tmp_path / "prompt.txt", tmp_path / "link"
    prompt.write_text(IDS)
    link.symlink_to(prompt)
    common = ("run", *CPU, "--model", ids_model, "--max-new-tokens", "9", "--trace", str(link))
    assert "is the file of the prompt; give another file" in refused(*common, "--prompt-file", str(prompt)).err
    assert "is no trace, so it is not replaced" in refused(*common, stdin=IDS.encode()).err
    assert prompt.read_text() == IDS
