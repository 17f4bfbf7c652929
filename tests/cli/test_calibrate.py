"""`ds-offload calibrate`: what it writes, what it prints, what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

TEXT = "The clock over the harbour struck nine. " * 20


@pytest.fixture
def document(tmp_path: Path) -> str:
    path = tmp_path / "document.txt"
    path.write_text(TEXT, encoding="utf-8")
    return str(path)


def load(model: str, path: str) -> Any:
    """The calibration in `path`, checked against the model in a folder."""
    from ds_offload.calibration import Calibration
    from ds_offload.loading import find_model, load_weights

    loaded = load_weights(find_model(model), torch.device("cpu"))
    return Calibration.load(path, loaded.fingerprint), loaded


def test_writes_the_file_it_is_told_to(
    command: Callable[..., Any], plain_model: str, document: str, tmp_path: Path
) -> None:
    from ds_offload.calibration import calibrate
    from ds_offload.decoder import DecoderStack

    out = str(tmp_path / "mine.safetensors")
    ended = command("calibrate", "--model", plain_model, "--data", document, "--out", out, "--device", "cpu")
    assert ended.status == 0, ended.err
    assert ended.out.startswith(f"wrote {out}: 800 tokens of document.txt, ")
    made, loaded = load(plain_model, out)
    assert (made.tokens, made.text) == (800, "document.txt")
    ids = loaded.tokenizer(TEXT)["input_ids"]
    expected = calibrate(DecoderStack(loaded.model), ids, fingerprint=loaded.fingerprint, text="", block=512)
    assert torch.equal(made.importance, expected.importance)


def test_json_is_one_object_and_tokens_are_a_limit(
    command: Callable[..., Any], plain_model: str, document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = command(
        *("calibrate", "--model", plain_model, "--data", document, "--out", "mine", "--tokens", "100"),
        *("--device", "cpu", "--json"),
    )
    assert ended.status == 0, ended.err
    figures = json.loads(ended.out)
    made, loaded = load(plain_model, "mine")
    seconds = figures.pop("seconds")
    assert 0 < seconds < 60
    assert figures == {
        "out": str(tmp_path / "mine"),
        "model": plain_model,
        "fingerprint": loaded.fingerprint,
        "tokens": 100,
        "layers": 3,
        "kv_heads": 2,
        "head_dim": 32,
    }
    assert made.tokens == 100


def test_without_out_the_model_uses_it_from_then_on(
    command: Callable[..., Any], chat_model: str, document: str, session_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ds_offload import calibration
    from ds_offload.decoder import DecoderStack

    ended = command("calibrate", "--model", chat_model, "--data", document, "--device", "cpu", "--json")
    assert ended.status == 0, ended.err
    out = json.loads(ended.out)["out"]
    assert Path(out).parent == session_cache / "calibration"
    made, loaded = load(chat_model, out)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("calibrated again")

    monkeypatch.setattr(calibration, "calibrate", never)
    found = calibration.find_or_make_calibration(loaded, DecoderStack(loaded.model), None)
    assert found.text == "document.txt"
    assert torch.equal(found.importance, made.importance)
    os.unlink(out)


def test_the_shipped_text_is_the_default(command: Callable[..., Any], plain_model: str, tmp_path: Path) -> None:
    ended = command(
        "calibrate", "--model", plain_model, "--out", str(tmp_path / "c"), "--tokens", "1k", "--device", "cpu"
    )
    assert ended.status == 0, ended.err
    assert "1,024 tokens of the shipped text" in ended.out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"", "is empty"),
        (b" \n ", "only white space"),
        (b"GIF89a\0\x01", "binary"),
        (b"caf\xe9 " * 100, "not UTF-8"),
        (b"A sentence. " * 5, "too short to fit labels to; give a text of at least 64 tokens"),
        ("文文文文 ".encode() * 4 + b"abcdefghijk", "too short to fit labels to; give a text of at least 64 tokens"),
    ],
)
def test_bad_data_is_refused(
    refused: Callable[..., Any], plain_model: str, tmp_path: Path, content: bytes | None, message: str
) -> None:
    data = tmp_path / "data"
    if content is not None:
        data.write_bytes(content)
    ended = refused(
        *("calibrate", "--model", plain_model, "--data", str(data), "--out", str(tmp_path / "c"), "--device", "cpu")
    )
    assert message in ended.err
    assert str(data) in ended.err
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("count", [63, 64])
def test_sixty_four_tokens_are_enough(
    command: Callable[..., Any], plain_model: str, tmp_path: Path, count: int
) -> None:
    data = tmp_path / "data"
    data.write_text("x" * count)
    ended = command(
        *("calibrate", "--model", plain_model, "--data", str(data), "--out", str(tmp_path / "c"), "--device", "cpu")
    )
    assert ended.status == (0 if count == 64 else 2)
    assert ("too short" in ended.err) == (count == 63)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "63"], "tokens='63' is too few to fit labels; give at least 64"),
        (["--tokens", "0"], "tokens='0' must be at least 1"),
        (["--tokens", "4q"], "tokens='4q' is not a size"),
        (["--out", ""], "out='' is empty; give a path, or leave it out"),
        (["--out", "."], "cannot write .: it is not a regular file"),
        (["--out", "no/such/folder/c"], "there is no folder no/such/folder"),
        # Refused before a model is looked for.
        (
            ["--out", "c" * 300, "--model", "no-such-model"],
            f"out='{'c' * 300}' is too long: a name in it has 300 bytes; give",
        ),
        (["--model", "no-such-model"], "no-such-model"),
        (["--device", "tpu"], "device='tpu' is unknown"),
        (["--load-format", "dummy"], "not kept in the cache; give --out FILE"),
    ],
)
def test_bad_arguments_are_refused(
    refused: Callable[..., Any], plain_model: str, document: str, arguments: list[str], message: str
) -> None:
    ended = refused("calibrate", "--model", plain_model, "--device", "cpu", "--data", document, *arguments)
    assert message in ended.err


def test_a_model_without_a_tokenizer_is_refused(refused: Callable[..., Any], ids_model: str, document: str) -> None:
    ended = refused("calibrate", "--model", ids_model, "--data", document, "--device", "cpu")
    assert "has no tokenizer, and calibration on a text needs one" in ended.err


@pytest.mark.parametrize("there", ["the text itself", "weights", "channels"])
def test_a_file_of_another_kind_is_not_replaced(
    refused: Callable[..., Any], plain_model: str, document: str, tmp_path: Path, there: str
) -> None:
    out = tmp_path / "mine"
    if there == "the text itself":
        out = Path(document)
    elif there == "weights":
        out.write_bytes((Path(plain_model) / "model.safetensors").read_bytes())
    else:
        out.write_text('{"model.layers.0.self_attn": [[1]]}')
    before = out.read_bytes()
    ended = refused("calibrate", "--model", plain_model, "--data", document, "--out", str(out), "--device", "cpu")
    assert f"{out} is there and is no calibration, so it is not replaced; give another path" in ended.err
    assert out.read_bytes() == before


def test_a_calibration_and_an_empty_file_are_replaced(
    command: Callable[..., Any], plain_model: str, document: str, tmp_path: Path
) -> None:
    out = tmp_path / "mine"
    out.touch()
    for tokens in ("64", "65"):
        ended = command(
            *("calibrate", "--model", plain_model, "--data", document, "--out", str(out), "--tokens", tokens),
            *("--device", "cpu"),
        )
        assert ended.status == 0, ended.err
        assert load(plain_model, str(out))[0].tokens == int(tokens)


def test_a_cache_that_cannot_be_written_is_refused_before_the_work(
    command: Callable[..., Any], plain_model: str, document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("DS_OFFLOAD_CACHE", str(tmp_path / "file"))
    ended = command("calibrate", "--model", plain_model, "--data", document, "--device", "cpu")
    assert ended.status == 2
    assert "there is no folder" in ended.err
    assert "calibrating" not in ended.err


def test_dummy_weights_go_to_a_file(
    command: Callable[..., Any], plain_model: str, document: str, tmp_path: Path
) -> None:
    ended = command(
        *("calibrate", "--model", plain_model, "--load-format", "dummy", "--data", document, "--tokens", "64"),
        *("--out", str(tmp_path / "c"), "--device", "cpu"),
    )
    assert ended.status == 0, ended.err
    assert (tmp_path / "c").stat().st_size > 0


def test_the_command_module_loads_without_torch() -> None:
    code = "import sys; import ds_offload.cli.calibrate; assert not {'torch', 'transformers'} & set(sys.modules)"
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
