"""A trace of decode steps: written where enough steps ran, refused where it cannot be written."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
from pathlib import Path

import pytest
from tiny_models import random_prompts, save_tiny, tiny_config

from ds_offload import OffloadConfig, OffloadedGenerator
from ds_offload.errors import InputError
from ds_offload.step_trace import LEAST_TOKENS, SKIPPED_STEPS, TRACED_STEPS, check_trace

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
def test_a_trace_shows_the_steps_and_changes_no_token(
    device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny(tmp_path, tiny_config("llama"))
    prompt, file = random_prompts(60)[0], tmp_path / "trace.json"
    new = 1 + SKIPPED_STEPS + TRACED_STEPS + 1
    with OffloadedGenerator.from_pretrained(
        str(tmp_path),
        config=OffloadConfig(max_context=1024, sink_tokens=2, recent_tokens=4, token_budget=16),
        device=device,
    ) as gen:
        plain = gen.generate(prompt, max_new_tokens=new)
        traced = gen.generate(prompt, max_new_tokens=new, trace=file)
        streamed = "".join(gen.stream(prompt, max_new_tokens=new, trace=tmp_path / "other.json"))
    assert traced.token_ids == plain.token_ids and streamed == plain.text
    assert f"written to {file}" in capsys.readouterr().err
    events = json.loads(file.read_text())["traceEvents"]
    names = [str(event.get("name")) for event in events]
    if device == "cpu":
        # Four steps of three layers.
        assert sum(name == "aten::embedding" for name in names) >= TRACED_STEPS
    else:
        kernels = [event for event in events if event.get("cat") == "kernel"]
        # Attention fetches its rows itself.
        attention = [event for event in kernels if re.search("slot_(vector|tensor_core)_kernel", event["name"])]
        assert len(attention) == TRACED_STEPS * 3
    assert (tmp_path / "other.json").stat().st_size > 1000
    # What was written may be written again.
    check_trace(file, new)


def test_too_few_tokens_are_refused_and_too_short_an_answer_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny(tmp_path, tiny_config("llama"))
    file, prompt = tmp_path / "trace.json", random_prompts(20)[0]
    with OffloadedGenerator.from_pretrained(str(tmp_path), device="cpu") as gen:
        with pytest.raises(InputError, match=f"max_new_tokens={LEAST_TOKENS - 1} ends it before; set --max-new-tokens"):
            gen.generate(prompt, max_new_tokens=LEAST_TOKENS - 1, trace=file)
        first = gen.generate(prompt, max_new_tokens=1).token_ids[0]
        gen.loaded = dataclasses.replace(gen.loaded, eos_token_ids=frozenset([first]))
        assert gen.generate(prompt, max_new_tokens=20, trace=file).finish_reason == "stop"
    assert not file.exists()
    assert "no trace was written: it begins at token 5, and the answer ended before it" in capsys.readouterr().err


def test_a_trace_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    save_tiny(tmp_path, tiny_config("llama"))
    with OffloadedGenerator.from_pretrained(str(tmp_path), device="cpu") as gen:
        for wrong, reason in ((tmp_path, "is a folder"), (tmp_path / "no" / "t.json", "is no folder")):
            with pytest.raises(InputError, match=reason):
                gen.generate(random_prompts(20)[0], max_new_tokens=20, trace=wrong)
            with pytest.raises(InputError, match=reason):
                gen.stream(random_prompts(20)[0], max_new_tokens=20, trace=wrong)


def test_a_trace_that_may_not_be_written(tmp_path: Path) -> None:
    there, new = tmp_path / "there.json", tmp_path / "new.json"
    there.write_text(as_it_was := '{"traceEvents": []}')
    check_trace(there, 99)
    check_trace(new, 99)
    assert there.read_text() == as_it_was and not new.exists()
    link = tmp_path / "link.json"
    link.symlink_to(new)
    check_trace(link, 99)
    assert link.is_symlink()
    # A file system that takes no files, not even from root.
    with pytest.raises(InputError, match=r"cannot write to trace=/proc/t\.json: No such file or directory; give"):
        check_trace(Path("/proc/t.json"), 99)


@pytest.mark.parametrize("content", ["A report of the year.", '{"model_type": "llama"}', '["traceEvents"]'])
def test_a_file_of_another_kind_is_not_replaced(content: str, tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.write_text(content)
    with pytest.raises(InputError, match="there is there and is no trace, so it is not replaced; give another file"):
        check_trace(there, 99)
    assert there.read_text() == content
    there.write_text("")
    check_trace(there, 99)
    check_trace(Path(os.devnull), 99)


def test_a_trace_that_the_disk_has_no_room_for_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(source: Path, target: Path) -> None:
        assert json.loads(source.read_text())["traceEvents"]
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("ds_offload.step_trace.shutil.copyfile", full)
    save_tiny(tmp_path, tiny_config("llama"))
    with OffloadedGenerator.from_pretrained(str(tmp_path), device="cpu") as gen:
        out = gen.generate(random_prompts(20)[0], max_new_tokens=9, trace=tmp_path / "t.json")
    assert len(out.token_ids) == 9
    assert "the trace was not written to" in (said := capsys.readouterr().err) and "No space left on device" in said
    assert "written to" not in said.replace("not written to", "")


def test_pipes_and_where_the_answer_goes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening a pipe that nobody reads would hang; an answer and a trace in one file are neither."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "answer").touch()
    there = os.stat(tmp_path / "answer")
    monkeypatch.setattr("ds_offload.step_trace.os.fstat", lambda number: there)
    for name in ("pipe", "answer"):
        with pytest.raises(InputError, match="is a pipe, or where the answer goes; give the name of a file"):
            check_trace(tmp_path / name, 99)
