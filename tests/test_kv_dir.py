"""K/V in files: the same bits as in memory, nothing left behind, and refusals before anything is read."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import random_prompts

import ds_offload.memory.file_segments as file_segments
from ds_offload import InputError, OffloadConfig, OffloadedGenerator
from ds_offload.errors import MemoryPlanError
from ds_offload.memory.staging_ring import RING_BYTES

NEW = 12
PROMPTS = random_prompts(150, 41)
QUESTIONS = [random_prompts(length, seed=length)[0] for length in (9, 20)]
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def on_a_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Temporary folders may be in memory, which is refused elsewhere."""
    monkeypatch.setattr(file_segments, "_file_system", lambda folder: "ext4")


def make(model: Path, device: str = "cpu", **changes: Any) -> OffloadedGenerator:
    config = {"max_context": 400, "sink_tokens": 2, "recent_tokens": 4, "token_budget": 24, "segment_tokens": 16}
    return OffloadedGenerator.from_pretrained(str(model), config=OffloadConfig(**config | changes), device=device)


CASES: list[dict[str, Any]] = [
    {},
    {"prefetch": "exact"},
    {"prefetch": "speculative", "hot_set": 1},
    {"kv_dtype": "int4", "hot_set": 0},
    {"kv_dtype": "int8", "dense_layers": (1,), "prefetch": "exact"},
]


@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize("changes", CASES)
def test_the_same_bits_as_in_memory(
    staged: bool, changes: dict[str, Any], tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read in place, and as for a CUDA device, through the staging ring."""
    monkeypatch.setattr(file_segments.FileSegments, "left_pageable", lambda pool, block: staged)
    with make(tiny_llama, **changes) as gen:
        expected = gen.generate(PROMPTS, max_new_tokens=NEW, output_logits=True)
    with make(tiny_llama, **changes, kv_dir=tmp_path) as gen:
        outs = gen.generate(PROMPTS, max_new_tokens=NEW, output_logits=True)
    for out, other in zip(outs, expected, strict=True):
        assert torch.equal(out.logits, other.logits)
    stats, before = outs[0].stats, expected[0].stats
    assert (stats["disk_kv_bytes"], stats["host_kv_bytes"]) == (before["host_kv_bytes"], before["disk_kv_bytes"])
    assert stats["disk_kv_bytes"] > 0 and stats["h2d_bytes_per_token"] == before["h2d_bytes_per_token"]
    assert list(tmp_path.iterdir()) == []
    assert str(tmp_path) not in Path("/proc/self/maps").read_text(), "the files go with the answer"


@pytest.mark.parametrize("changes", [{}, {"kv_dtype": "int8"}])
def test_sessions_in_files(changes: dict[str, Any], tiny_llama: Path, tmp_path: Path) -> None:
    """Forks share files; what was saved in memory loads into files, and the other way round."""
    place, kv_dir = tmp_path / "book", tmp_path / "kv"
    kv_dir.mkdir()
    with make(tiny_llama, **changes) as gen, gen.prefill(PROMPTS[0]) as session:
        session.save(place)
        expected = [session.ask(question, max_new_tokens=NEW, output_logits=True) for question in QUESTIONS]
    with make(tiny_llama, **changes, kv_dir=kv_dir) as gen, gen.load_session(place) as session, session.fork() as fork:
        shared = {one._conversation.context.store.table.tensors[0][8].data_ptr() for one in (session, fork)}
        assert len(shared) == 1
        session.save(tmp_path / "again")
        for one in (session, fork):
            outs = [one.ask(question, max_new_tokens=NEW, output_logits=True) for question in QUESTIONS]
            for out, other in zip(outs, expected, strict=True):
                assert torch.equal(out.logits, other.logits)
            session.close()
    assert list(kv_dir.iterdir()) == [] and str(kv_dir) not in Path("/proc/self/maps").read_text()
    for file in sorted(place.glob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_nothing_is_left_of_a_killed_process(tiny_llama: Path, tmp_path: Path) -> None:
    script = """
import os, signal, sys
import ds_offload.memory.file_segments as file_segments
from ds_offload import OffloadConfig, OffloadedGenerator
file_segments._file_system = lambda folder: "ext4"
config = OffloadConfig(max_context=400, token_budget=24, segment_tokens=16, kv_dir=sys.argv[2])
def die(phase, done, total):
    if phase == "decode":
        print(open("/proc/self/maps").read().count(sys.argv[2]), len(os.listdir(sys.argv[2])), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
with OffloadedGenerator.from_pretrained(sys.argv[1], config=config, device="cpu") as gen:
    gen.generate([1, 2, 3] * 50, max_new_tokens=5, on_progress=die)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tiny_llama), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    files, names = map(int, done.stdout.split())
    # 150 tokens, 5 new ones, 16 a segment.
    assert files == 10 and names == 0
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_refused_before_anything_is_read(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with make(tiny_llama, kv_dir=tmp_path, kv_dtype="fp32") as gen:
        monkeypatch.setattr(file_segments.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1 << 16))
        with pytest.raises(
            MemoryPlanError, match=r"tokens need .* of disk and 0.06 MiB are there \(kv_dir\);"
        ) as error:
            gen.generate(PROMPTS[0], max_new_tokens=NEW)
        assert "\n" not in str(error.value)
        assert len(gen.generate(PROMPTS[1][:9], max_new_tokens=2).token_ids) == 2


def test_a_disk_that_fills_up_meanwhile(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: int) -> None:
        raise OSError(28, "No space left on device")

    reported: list[str] = []
    with make(tiny_llama, kv_dir=tmp_path) as gen, gen.prefill(PROMPTS[0]) as session:
        expected = session.ask(QUESTIONS[0], keep=False, max_new_tokens=NEW, output_logits=True)
        with monkeypatch.context() as patch:
            patch.setattr(file_segments.os, "posix_fallocate", full)
            with pytest.raises(MemoryPlanError, match="has no room"):
                gen.generate(PROMPTS[1], max_new_tokens=2, on_progress=lambda *step: reported.append(step[0]))
            with pytest.raises(MemoryPlanError, match="has no room"):
                session.ask(random_prompts(120, seed=3)[0])
        assert reported == [], "no token was read"
        assert torch.equal(session.ask(QUESTIONS[0], max_new_tokens=NEW, output_logits=True).logits, expected.logits)


def test_what_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"kv_dir=.* is for K/V on the host, and kv_location='gpu'"):
        OffloadConfig(kv_dir=tmp_path, kv_location="gpu")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"is no folder; make it"):
        make(tiny_llama, kv_dir=tmp_path / "nowhere")


@pytest.mark.gpu
@pytest.mark.parametrize("changes", CASES)
def test_the_same_tokens_on_a_gpu(changes: dict[str, Any], tiny_llama: Path, tmp_path: Path) -> None:
    with make(tiny_llama, "cuda", **changes) as gen:
        expected = gen.generate(PROMPTS, max_new_tokens=NEW)
    with make(tiny_llama, "cuda", **changes, kv_dir=tmp_path) as gen:
        outs = gen.generate(PROMPTS, max_new_tokens=NEW)
        assert [out.token_ids for out in outs] == [out.token_ids for out in expected]
        # Rows come by way of the host: no graph, and nothing but the ring is page-locked.
        assert outs[0].stats["graph_capture_s"] is None
        assert 0 < outs[0].stats["host_pinned_bytes"] <= RING_BYTES[0] < outs[0].stats["disk_kv_bytes"] + RING_BYTES[0]
        with gen.prefill(PROMPTS[0]) as session:
            first = session.ask(QUESTIONS[0], keep=False, max_new_tokens=NEW)
            assert session.ask(QUESTIONS[0], max_new_tokens=NEW).token_ids == first.token_ids
    assert list(tmp_path.iterdir()) == []
