"""Saving that ends early, by a kill or a full disk, and what it must not touch."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from session_case import DOCUMENT, NEW, QUESTIONS, ask, make, tree

import ds_offload.tensor_file
from ds_offload import InputError
from ds_offload.session_file import SessionWriteError, verify_session
from ds_offload.session_header import SessionHeader
from ds_offload.session_place import HEADER, check_place, held, recover, remove_session

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("moment", ["before", "files", "renames"])
def test_killed_while_saving(tiny_llama: Path, saved_session: Path, moment: str) -> None:
    """The old session is there, or where it was being replaced at that moment, none; the next save cleans up."""
    before = tree(saved_session)
    script = """
import os, signal, sys
from ds_offload import session_file, session_place
from ds_offload import OffloadConfig, OffloadedGenerator
config = OffloadConfig(max_context=400, sink_tokens=2, recent_tokens=4, token_budget=24, segment_tokens=16)
def die(*arguments, **options): os.kill(os.getpid(), signal.SIGKILL)
def die_behind_the_first_rename(source, target, rename=os.rename):
    if str(source).endswith(".tmp"): die()
    rename(source, target)
with OffloadedGenerator.from_pretrained(sys.argv[1], config=config, device="cpu") as gen:
    with gen.prefill([1, 2, 3] * 20) as session:
        if sys.argv[3] == "before": session_file.write_file = die
        if sys.argv[3] == "files": session_file.put = die
        if sys.argv[3] == "renames": session_place.os.rename = die_behind_the_first_rename
        session.save(sys.argv[2])
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tiny_llama), str(saved_session), moment],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    assert len(list(saved_session.parent.iterdir())) > 1
    if moment == "renames":
        assert not saved_session.exists()
        recover(saved_session)
    assert tree(saved_session) == before
    if moment == "files":
        remove_session(saved_session)
        assert list(saved_session.parent.iterdir()) == []
        return
    with make(tiny_llama) as gen, gen.load_session(saved_session) as session:
        ask(session, QUESTIONS[0])
        session.save(saved_session)
    assert list(saved_session.parent.iterdir()) == [saved_session], "what the killed process left is gone"
    assert SessionHeader.read(saved_session).token_ids[:159] == DOCUMENT + QUESTIONS[0]


def test_killed_at_any_time(tiny_llama: Path, saved_session: Path) -> None:
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
            [sys.executable, "-c", script, str(tiny_llama), str(saved_session)],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
        )
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        time.sleep(0.05 + 0.013 * moment)
        process.kill()
        process.wait()
        process.stdout.close()
        with held(saved_session):
            pass
        assert len(verify_session(saved_session).token_ids) == 150
        assert list(saved_session.parent.iterdir()) == [saved_session]


@pytest.mark.parametrize("failing", ["calibration", "layer-0001", "labels", HEADER])
def test_a_disk_that_fills_up(
    tiny_llama: Path, saved_session: Path, failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tree(saved_session.parent)

    def write(file: Any, part: Any) -> None:
        if failing in file.name:
            file.write(bytes(part)[:7])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        file.write(part)

    with make(tiny_llama) as gen, gen.prefill(DOCUMENT) as session:
        monkeypatch.setattr(ds_offload.tensor_file, "_write", write)
        for place in (saved_session, saved_session.parent / "new"):
            with pytest.raises(SessionWriteError, match=f"cannot write the session {place}: No space left"):
                session.save(place)
        assert tree(saved_session.parent) == before
        # The session itself goes on.
        assert len(ask(session, QUESTIONS[0]).token_ids) == NEW


def test_a_disk_without_room_is_refused_before_anything_is_written(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=9))
    with make(tiny_llama) as gen, gen.prefill(DOCUMENT) as session, pytest.raises(InputError, match="GiB of disk"):
        session.save(tmp_path / "book")
    assert list(tmp_path.iterdir()) == []


def test_a_place_where_no_folder_can_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("text")
    with pytest.raises(InputError, match=r"cannot make the session .*: .*file is no folder; give another path"):
        check_place(tmp_path / "file" / "sessions" / "book")
    check_place(tmp_path / "new" / "book")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(InputError, match=f"{tmp_path} is not writable; give another path"):
        check_place(tmp_path / "new" / "book")


def test_nothing_else_is_overwritten_or_removed(tiny_llama: Path, tmp_path: Path) -> None:
    other = tmp_path / "mine"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    with make(tiny_llama) as gen, gen.prefill(DOCUMENT) as session:
        for place in (other, tmp_path / "file"):
            with pytest.raises(InputError, match="is there already and is no session"):
                session.save(place)
            with pytest.raises(InputError, match="is no session"):
                remove_session(place)
        session.save(tmp_path / "book")
        for name in ("notes.txt", "adapter.safetensors"):
            (tmp_path / "book" / name).write_text("mine")
            with pytest.raises(InputError, match=f"holds {name}"):
                remove_session(tmp_path / "book")
            (tmp_path / "book" / name).unlink()
    remove_session(tmp_path / "book")
    assert tree(tmp_path) == {"mine/notes.txt": b"mine", "file": b"mine"}
