"""Saved sessions: the same answers when loaded, and nothing that was cut, changed or of another model is."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import random_prompts, save_tiny, tiny_config

import ds_offload.session_file
import ds_offload.tensor_file
from ds_offload import InputError, OffloadConfig, OffloadedGenerator
from ds_offload.errors import LoadError
from ds_offload.sealed_json import seal, unseal
from ds_offload.session_file import SessionWriteError, remove_session, verify_session
from ds_offload.session_header import HEADER, SessionHeader, tokenizer_fingerprint

NEW = 12
DOCUMENT = random_prompts(150)[0]
QUESTIONS = [random_prompts(length, seed=length)[0] for length in (9, 20)]
ROOT = Path(__file__).resolve().parents[1]
FILES = {HEADER, "calibration.safetensors", "labels.safetensors"} | {f"layer-{n:04d}.safetensors" for n in range(3)}


def make(model: Path, device: str = "cpu", **changes: Any) -> OffloadedGenerator:
    config = {"max_context": 400, "sink_tokens": 2, "recent_tokens": 4, "token_budget": 24, "segment_tokens": 16}
    return OffloadedGenerator.from_pretrained(str(model), config=OffloadConfig(**config | changes), device=device)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_tiny(folder, tiny_config("llama"))
    return folder


@pytest.fixture(scope="module")
def original(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sessions") / "original"
    with make(model) as gen, gen.prefill(DOCUMENT) as session:
        session.save(folder)
    return folder


@pytest.fixture
def saved(original: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    folder = tmp_path / "book"
    folder.mkdir()
    for file in original.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def ask(session: Any, question: list[int], **options: Any) -> Any:
    return session.ask(question, max_new_tokens=NEW, output_logits=True, **options)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dense_layers": (1,)},
        {"dense_layers": (0, 1, 2)},
        {"kv_location": "gpu"},
        {"kv_dtype": "bf16", "label_bits": 8},
        {"sink_tokens": 70, "recent_tokens": 90, "token_budget": 200},
        {"kv_dtype": "int8"},
        {"kv_dtype": "int4", "dense_layers": (1,), "label_bits": 8},
        {"kv_dtype": "int4", "kv_location": "gpu"},
        {"kv_dtype": "int4", "dense_layers": (0, 1, 2)},
        {"kv_dtype": "int8", "sink_tokens": 70, "recent_tokens": 90, "token_budget": 200},
    ],
)
def test_a_loaded_session_gives_the_same_answers(changes: dict[str, Any], model: Path, tmp_path: Path) -> None:
    with make(model, **changes) as gen, gen.prefill(DOCUMENT) as session:
        first = ask(session, QUESTIONS[0])
        header = session.save(tmp_path / "deep" / "er" / "book")
        ids, second = session.token_ids, ask(session, QUESTIONS[1])
    apart = changes.get("kv_dtype") in ("int8", "int4") and changes.get("dense_layers") != (0, 1, 2)
    assert {file.name for file in (tmp_path / "deep" / "er" / "book").iterdir()} == (
        FILES | {"window.safetensors"} if apart else FILES
    )
    assert list((tmp_path / "deep" / "er").iterdir()) == [tmp_path / "deep" / "er" / "book"]
    assert verify_session(tmp_path / "deep" / "er" / "book") == header
    # In a process that knows no calibration, and with segments of another size.
    place = tmp_path / "deep" / "er" / "book"
    with make(model, **changes, segment_tokens=37) as gen, gen.load_session(place) as session:
        assert session.token_ids == ids == DOCUMENT + QUESTIONS[0] + first.token_ids
        assert session.document_tokens == 150 and session.stored == len(ids) - 1
        out = ask(session, QUESTIONS[1], keep=False)
        assert torch.equal(out.logits, second.logits)
        with session.fork() as fork:
            assert torch.equal(ask(fork, QUESTIONS[1]).logits, second.logits)


def test_what_does_not_change_rows_and_labels_may_change(model: Path, saved: Path) -> None:
    changed = {"token_budget": 48, "sink_tokens": 9, "recent_tokens": 20, "kv_location": "gpu", "max_context": 300}
    with make(model, **changed) as gen, gen.prefill(DOCUMENT) as session, gen.load_session(saved) as loaded:
        assert torch.equal(ask(loaded, QUESTIONS[0]).logits, ask(session, QUESTIONS[0]).logits)


def test_quantised_rows_come_with_their_window(model: Path, tmp_path: Path) -> None:
    place = tmp_path / "book"
    with make(model, kv_dtype="int4") as gen, gen.prefill(DOCUMENT) as session:
        session.save(place)
        kept = session._conversation.context.window_buffer
        assert kept is not None
        window, expected = kept.copy(), ask(session, QUESTIONS[0], keep=False)
    rows = load_file(place / "layer-0001.safetensors")["rows"]
    # 16 channels: 8 bytes of codes and 8 of centres and steps, for K and for V.
    assert rows.dtype == torch.uint8 and rows.shape == (2, 150, 2, 16)
    saved = load_file(place / "window.safetensors")["rows"]
    assert saved.dtype == torch.float32 and torch.equal(saved, torch.cat([window[layer] for layer in range(3)]))
    # Left open, the dtype is the session's; in another place of the K/V, the rows are the same.
    for changes in ({}, {"kv_dtype": "int4", "kv_location": "gpu"}, {"kv_dtype": "int4", "token_budget": 24}):
        with make(model, **changes) as gen, gen.load_session(place) as session:
            assert session.config.kv_dtype == "int4"
            assert torch.equal(ask(session, QUESTIONS[0]).logits, expected.logits)
    refusals = {
        "kv_dtype (int4, here int8)": {"kv_dtype": "int8"},
        "kv_dtype (int4, here fp32)": {"kv_dtype": "fp32"},
        "window (sink_tokens=2, recent_tokens=4, here sink_tokens=9, recent_tokens=4)": {"sink_tokens": 9},
    }
    for message, changes in refusals.items():
        with make(model, **changes) as gen, pytest.raises(InputError, match=re.escape(message)):
            gen.load_session(place)
    data = bytearray((place / "window.safetensors").read_bytes())
    data[-1] ^= 4
    (place / "window.safetensors").write_bytes(data)
    with make(model) as gen, pytest.raises(LoadError, match=r"window\.safetensors is damaged"):
        gen.load_session(place)


def test_codes_are_of_their_calibration(model: Path, tmp_path: Path) -> None:
    """A calibration that differs in what keys are divided by alone is another one where K/V are quantised."""
    with make(model, kv_dtype="int8") as gen, gen.prefill(DOCUMENT) as session:
        session.save(tmp_path / "book")
        made = gen.calibrated([])
        dataclasses.replace(made, key_factor=made.key_factor * 2).save(tmp_path / "other.safetensors")
    other = make(model, kv_dtype="int8", calibration=str(tmp_path / "other.safetensors"))
    with other as gen, pytest.raises(InputError, match="another calibration than"):
        gen.load_session(tmp_path / "book")


def test_the_format_before_is_read(model: Path, saved: Path) -> None:
    content = unseal((saved / HEADER).read_bytes())
    del content["identity"]["window"]
    (saved / HEADER).write_bytes(seal(content | {"version": 1}))
    with make(model) as gen, gen.load_session(saved) as session:
        assert session.token_ids == DOCUMENT


def test_files_are_safetensors(saved: Path) -> None:
    assert load_file(saved / "layer-0001.safetensors")["rows"].shape == (2, 150, 2, 16)
    labels = load_file(saved / "labels.safetensors")["rows"]
    assert labels.dtype == torch.uint8 and labels.shape[:3] == (3, 2, 150)


def test_another_process_answers_the_same(model: Path, saved: Path) -> None:
    script = """
import sys
from ds_offload import OffloadConfig, OffloadedGenerator
config = OffloadConfig(max_context=400, sink_tokens=2, recent_tokens=4, token_budget=24, segment_tokens=16)
with OffloadedGenerator.from_pretrained(sys.argv[1], config=config, device="cpu") as gen:
    with gen.load_session(sys.argv[2]) as session:
        print(session.ask([1, 2, 3], max_new_tokens=12).token_ids)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(model), str(saved)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    with make(model) as gen, gen.prefill(DOCUMENT) as session:
        assert json.loads(done.stdout) == session.ask([1, 2, 3], max_new_tokens=12).token_ids


@pytest.mark.parametrize("moment", ["before", "files", "renames"])
def test_killed_while_saving(model: Path, saved: Path, moment: str) -> None:
    """The old session is there, or where it was being replaced at that moment, none; the next save cleans up."""
    before = tree(saved)
    script = """
import os, signal, sys
import ds_offload.session_file as session_file
from ds_offload import OffloadConfig, OffloadedGenerator
config = OffloadConfig(max_context=400, sink_tokens=2, recent_tokens=4, token_budget=24, segment_tokens=16)
def die(*arguments, **options): os.kill(os.getpid(), signal.SIGKILL)
def die_behind_the_first_rename(source, target, rename=os.rename):
    if str(source).endswith(".tmp"): die()
    rename(source, target)
with OffloadedGenerator.from_pretrained(sys.argv[1], config=config, device="cpu") as gen:
    with gen.prefill([1, 2, 3] * 20) as session:
        if sys.argv[3] == "before": session_file.write_file = die
        if sys.argv[3] == "files": session_file._put = die
        if sys.argv[3] == "renames": session_file.os.rename = die_behind_the_first_rename
        session.save(sys.argv[2])
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(model), str(saved), moment],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    assert len(list(saved.parent.iterdir())) > 1
    if moment == "renames":
        assert not saved.exists()
        ds_offload.session_file.remove_leftovers(saved)
    assert tree(saved) == before
    if moment == "files":
        remove_session(saved)
        assert list(saved.parent.iterdir()) == []
        return
    with make(model) as gen, gen.load_session(saved) as session:
        ask(session, QUESTIONS[0])
        session.save(saved)
    assert list(saved.parent.iterdir()) == [saved], "what the killed process left is gone"
    assert SessionHeader.read(saved).token_ids[:159] == DOCUMENT + QUESTIONS[0]


def test_killed_at_any_time(model: Path, saved: Path) -> None:
    """A process that saves over and over, killed at four moments."""
    script = """
import sys
from ds_offload import OffloadConfig, OffloadedGenerator
config = OffloadConfig(max_context=400, sink_tokens=2, recent_tokens=4, token_budget=24, segment_tokens=16)
with OffloadedGenerator.from_pretrained(sys.argv[1], config=config, device="cpu") as gen:
    with gen.load_session(sys.argv[2]) as session:
        print("ready", flush=True)
        while True: session.save(sys.argv[2])
"""
    for moment in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(model), str(saved)],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
        )
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        time.sleep(0.05 + 0.013 * moment)
        process.kill()
        process.wait()
        process.stdout.close()
        ds_offload.session_file.remove_leftovers(saved)
        assert len(verify_session(saved).token_ids) == 150
        assert list(saved.parent.iterdir()) == [saved]


@pytest.mark.parametrize("failing", ["calibration", "layer-0001", "labels", HEADER])
def test_a_disk_that_fills_up(model: Path, saved: Path, failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tree(saved.parent)

    def write(file: Any, part: Any) -> None:
        if failing in file.name:
            file.write(bytes(part)[:7])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        file.write(part)

    with make(model) as gen, gen.prefill(DOCUMENT) as session:
        monkeypatch.setattr(ds_offload.tensor_file, "_write", write)
        for place in (saved, saved.parent / "new"):
            with pytest.raises(SessionWriteError, match=f"cannot write the session {place}: No space left"):
                session.save(place)
        assert tree(saved.parent) == before
        # The session itself goes on.
        assert len(ask(session, QUESTIONS[0]).token_ids) == NEW


def test_a_disk_without_room_is_refused_before_anything_is_written(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=9))
    with make(model) as gen, gen.prefill(DOCUMENT) as session, pytest.raises(InputError, match="GiB of disk"):
        session.save(tmp_path / "book")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_flipped_byte_is_found(model: Path, saved: Path, name: str) -> None:
    data = bytearray((saved / name).read_bytes())
    with make(model) as gen:
        for position in (3, len(data) // 2, len(data) - 1):
            damaged = data.copy()
            damaged[position] ^= 4
            (saved / name).write_bytes(damaged)
            for call in (lambda: gen.load_session(saved), lambda: verify_session(saved)):
                with pytest.raises(LoadError) as error:
                    call()
                assert "damaged" in str(error.value) and name in str(error.value)
                assert "\n" not in str(error.value)
        (saved / name).write_bytes(data)
        gen.load_session(saved).close()


@pytest.mark.parametrize("name", sorted(FILES))
@pytest.mark.parametrize("damage", ["cut", "longer", "empty", "missing"])
def test_a_file_of_another_length_is_found(model: Path, saved: Path, name: str, damage: str) -> None:
    data = (saved / name).read_bytes()
    (saved / name).unlink()
    if damage != "missing":
        (saved / name).write_bytes({"cut": data[:-1], "longer": data + b"x", "empty": b""}[damage])
    with make(model) as gen:
        for call in (lambda: gen.load_session(saved), lambda: verify_session(saved)):
            with pytest.raises(LoadError) as error:
                call()
            assert name in str(error.value) and "\n" not in str(error.value)


def test_another_model_or_setting_is_refused(model: Path, saved: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    torch.manual_seed(1)
    save_tiny(other, tiny_config("llama", rope_parameters={"rope_type": "default", "rope_theta": 5e5}))
    refusals: list[tuple[OffloadedGenerator, str]] = [
        (make(other), r"another model \(fingerprint \w{8}, here fingerprint \w{8}\), rope \(.*10000.*, here .*500000"),
        (make(model, kv_dtype="bf16"), r"another kv_dtype \(fp32, here bf16\);"),
        (make(model, label_bits=4), r"label_bits \(None, here 4\), label_code \(product, here scalar\);"),
        (make(model, label_channels=3), r"label_channels \(16, here 3\), label_bits .*label_code"),
        (make(model, dense_layers=(1,)), r"dense_layers \(\[\], here \[1\]\);"),
        (make(model, max_context=150), r"the session has 150 tokens and max_context=150"),
    ]
    for gen, message in refusals:
        with gen, pytest.raises(InputError, match=message) as error:
            gen.load_session(saved)
        assert "\n" not in str(error.value)


def test_another_calibration_is_refused(model: Path, saved: Path, tmp_path: Path) -> None:
    with make(model) as gen:
        gen.generate(random_prompts(50, seed=5)[0], max_new_tokens=1)
        gen.calibrated([]).save(tmp_path / "other.safetensors")
        # A calibration that was found or made gives way to the session's own.
        gen.load_session(saved).close()
    other = make(model, calibration=str(tmp_path / "other.safetensors"))
    with other as gen, pytest.raises(InputError, match=r"another calibration than .*other\.safetensors"):
        gen.load_session(saved)
    with make(model, calibration=str(saved / "calibration.safetensors")) as gen:
        gen.load_session(saved).close()


def test_a_newer_format_is_refused(model: Path, saved: Path) -> None:
    content = json.loads((saved / HEADER).read_bytes())
    (saved / HEADER).write_text(json.dumps(content | {"version": 3}))
    with make(model) as gen, pytest.raises(LoadError, match=r"format version 3, and this version .* reads up to 2"):
        gen.load_session(saved)


@pytest.mark.parametrize("content", [b"", b"[]", b"[" * 100_000, b"\xff", b"{}", b'{"format": "ds_offload.session"}'])
def test_what_is_no_header(saved: Path, content: bytes) -> None:
    (saved / HEADER).write_bytes(content)
    with pytest.raises(LoadError, match=r"session.json is damaged"):
        SessionHeader.read(saved)


@pytest.mark.parametrize(
    "changes", [{"stored": 0}, {"stored": 151}, {"files": {"../x": {"nbytes": 1, "sha256": ""}}}, {"token_ids": 5}]
)
def test_a_header_that_is_sealed_and_wrong(saved: Path, changes: dict[str, Any]) -> None:
    (saved / HEADER).write_bytes(seal(unseal((saved / HEADER).read_bytes()) | changes))
    with pytest.raises(LoadError, match=r"session.json is damaged"):
        SessionHeader.read(saved)


def test_nothing_else_is_overwritten_or_removed(model: Path, tmp_path: Path) -> None:
    other = tmp_path / "mine"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    with make(model) as gen, gen.prefill(DOCUMENT) as session:
        for place in (other, tmp_path / "file"):
            with pytest.raises(InputError, match="is there already and is no session"):
                session.save(place)
            with pytest.raises(InputError, match="is no session"):
                remove_session(place)
        session.save(tmp_path / "book")
        (tmp_path / "book" / "notes.txt").write_text("mine")
        with pytest.raises(InputError, match=r"holds notes.txt"):
            remove_session(tmp_path / "book")
    (tmp_path / "book" / "notes.txt").unlink()
    remove_session(tmp_path / "book")
    assert tree(tmp_path) == {"mine/notes.txt": b"mine", "file": b"mine"}


def test_there_is_none(model: Path, tmp_path: Path) -> None:
    with make(model) as gen:
        with pytest.raises(LoadError, match=r"there is no session .*nowhere;"):
            gen.load_session(tmp_path / "nowhere")
        with pytest.raises(LoadError, match="holds no session"):
            gen.load_session(tmp_path)


def test_tokenizers_have_fingerprints() -> None:
    class Vocabulary:
        def __init__(self, *words: str) -> None:
            self.words = words

        def get_vocab(self) -> dict[str, int]:
            return {word: number for number, word in enumerate(self.words)}

    assert tokenizer_fingerprint(None) == ""
    assert tokenizer_fingerprint(Vocabulary("a", "b")) == tokenizer_fingerprint(Vocabulary("a", "b"))
    assert tokenizer_fingerprint(Vocabulary("a", "b")) != tokenizer_fingerprint(Vocabulary("b", "a"))


@pytest.mark.gpu
@pytest.mark.parametrize(("first", "second"), [("cuda", "cpu"), ("cpu", "cuda"), ("cuda", "cuda")])
@pytest.mark.parametrize(
    "changes", [{}, {"dense_layers": (1,)}, {"kv_location": "gpu"}, {"kv_dtype": "int8"}, {"kv_dtype": "int4"}]
)
def test_across_devices(first: str, second: str, changes: dict[str, Any], model: Path, tmp_path: Path) -> None:
    with make(model, first, **changes) as gen, gen.prefill(DOCUMENT) as session:
        session.save(tmp_path / "book")
        answers = [ask(session, QUESTIONS[0])]
    with make(model, second, **changes) as gen, gen.load_session(tmp_path / "book") as session:
        answers.append(ask(session, QUESTIONS[0]))
    if first == second:
        assert answers[0].token_ids == answers[1].token_ids
    # The first is the question's. Later ones follow a selection, which rounding may change for a tie.
    torch.testing.assert_close(answers[0].logits[:1], answers[1].logits[:1], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(answers[0].logits[:3], answers[1].logits[:3], rtol=2e-2, atol=5e-2)
