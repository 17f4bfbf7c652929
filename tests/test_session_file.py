"""Saved sessions: the same answers when loaded, from plain files, in another process and on another device."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from session_case import DOCUMENT, FILES, QUESTIONS, ask, make

from ds_offload import InputError
from ds_offload.errors import LoadError
from ds_offload.session_file import verify_session

ROOT = Path(__file__).resolve().parents[1]


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
def test_a_loaded_session_gives_the_same_answers(changes: dict[str, Any], tiny_llama: Path, tmp_path: Path) -> None:
    with make(tiny_llama, **changes) as gen, gen.prefill(DOCUMENT) as session:
        first = ask(session, QUESTIONS[0])
        header = session.save(tmp_path / "deep" / "er" / "book")
        ids, second = session.token_ids, ask(session, QUESTIONS[2])
    apart = changes.get("kv_dtype") in ("int8", "int4") and changes.get("dense_layers") != (0, 1, 2)
    assert {file.name for file in (tmp_path / "deep" / "er" / "book").iterdir()} == (
        FILES | {"window.safetensors"} if apart else FILES
    )
    assert list((tmp_path / "deep" / "er").iterdir()) == [tmp_path / "deep" / "er" / "book"]
    assert verify_session(tmp_path / "deep" / "er" / "book") == header
    # In a process that knows no calibration, and with segments of another size.
    place = tmp_path / "deep" / "er" / "book"
    with make(tiny_llama, **changes, segment_tokens=37) as gen, gen.load_session(place) as session:
        assert session.token_ids == ids == DOCUMENT + QUESTIONS[0] + first.token_ids
        assert session.document_tokens == 150 and session.stored == len(ids) - 1
        out = ask(session, QUESTIONS[2], keep=False)
        assert torch.equal(out.logits, second.logits)
        with session.fork() as fork:
            assert torch.equal(ask(fork, QUESTIONS[2]).logits, second.logits)


def test_what_does_not_change_rows_and_labels_may_change(tiny_llama: Path, saved_session: Path) -> None:
    changed = {"token_budget": 48, "sink_tokens": 9, "recent_tokens": 20, "kv_location": "gpu", "max_context": 300}
    with (
        make(tiny_llama, **changed) as gen,
        gen.prefill(DOCUMENT) as session,
        gen.load_session(saved_session) as loaded,
    ):
        assert torch.equal(ask(loaded, QUESTIONS[0]).logits, ask(session, QUESTIONS[0]).logits)


def test_quantised_rows_come_with_their_window(tiny_llama: Path, tmp_path: Path) -> None:
    place = tmp_path / "book"
    with make(tiny_llama, kv_dtype="int4") as gen, gen.prefill(DOCUMENT) as session:
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
        with make(tiny_llama, **changes) as gen, gen.load_session(place) as session:
            assert session.config.kv_dtype == "int4"
            assert torch.equal(ask(session, QUESTIONS[0]).logits, expected.logits)
    refusals = {
        "kv_dtype (int4, here int8)": {"kv_dtype": "int8"},
        "kv_dtype (int4, here fp32)": {"kv_dtype": "fp32"},
        "window (sink_tokens=2, recent_tokens=4, here sink_tokens=9, recent_tokens=4)": {"sink_tokens": 9},
    }
    for message, changes in refusals.items():
        with make(tiny_llama, **changes) as gen, pytest.raises(InputError, match=re.escape(message)):
            gen.load_session(place)
    data = bytearray((place / "window.safetensors").read_bytes())
    data[-1] ^= 4
    (place / "window.safetensors").write_bytes(data)
    with make(tiny_llama) as gen, pytest.raises(LoadError, match=r"window\.safetensors is damaged"):
        gen.load_session(place)


def test_files_are_safetensors(saved_session: Path) -> None:
    assert load_file(saved_session / "layer-0001.safetensors")["rows"].shape == (2, 150, 2, 16)
    labels = load_file(saved_session / "labels.safetensors")["rows"]
    assert labels.dtype == torch.uint8 and labels.shape[:3] == (3, 2, 150)


def test_another_process_answers_the_same(tiny_llama: Path, saved_session: Path) -> None:
    script = """
import sys
from ds_offload import OffloadConfig, OffloadedGenerator
config = OffloadConfig(max_context=400, sink_tokens=2, recent_tokens=4, token_budget=24, segment_tokens=16)
with OffloadedGenerator.from_pretrained(sys.argv[1], config=config, device="cpu") as gen:
    with gen.load_session(sys.argv[2]) as session:
        print(session.ask([1, 2, 3], max_new_tokens=12).token_ids)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tiny_llama), str(saved_session)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    with make(tiny_llama) as gen, gen.prefill(DOCUMENT) as session:
        assert json.loads(done.stdout) == session.ask([1, 2, 3], max_new_tokens=12).token_ids


@pytest.mark.gpu
@pytest.mark.parametrize(("first", "second"), [("cuda", "cpu"), ("cpu", "cuda"), ("cuda", "cuda")])
@pytest.mark.parametrize(
    "changes", [{}, {"dense_layers": (1,)}, {"kv_location": "gpu"}, {"kv_dtype": "int8"}, {"kv_dtype": "int4"}]
)
def test_across_devices(first: str, second: str, changes: dict[str, Any], tiny_llama: Path, tmp_path: Path) -> None:
    with make(tiny_llama, first, **changes) as gen, gen.prefill(DOCUMENT) as session:
        session.save(tmp_path / "book")
        answers = [ask(session, QUESTIONS[0])]
    with make(tiny_llama, second, **changes) as gen, gen.load_session(tmp_path / "book") as session:
        answers.append(ask(session, QUESTIONS[0]))
    if first == second:
        assert answers[0].token_ids == answers[1].token_ids
    # The first is the question's. Later ones follow a selection, which rounding may change for a tie.
    torch.testing.assert_close(answers[0].logits[:1], answers[1].logits[:1], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(answers[0].logits[:3], answers[1].logits[:3], rtol=2e-2, atol=5e-2)
