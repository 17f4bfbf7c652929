"""Ctrl-C in `ds-offload chat`: while an answer comes, while a question is read, and at the prompt of a terminal."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from chat_case import BOOK, CPU, NEW, QUESTIONS, asked, lines, opened, printed

import ds_offload.conversation
from ds_offload.generation import Sequence

ROOT = Path(__file__).resolve().parents[2]
PROMPT = r"\n> $"
# A session's leader gets the first terminal that it opens: Ctrl-C comes from there.
STARTS = """
import os, sys
os.open(os.ttyname(0), os.O_RDWR)
from ds_offload.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def book(tmp_path: Path) -> str:
    file = tmp_path / "book.txt"
    file.write_text(BOOK, encoding="utf-8")
    return str(file)


class Terminal:
    """A command on a terminal: what is typed there, and what it shows."""

    def __init__(self, child: subprocess.Popen[bytes], end: int) -> None:
        self.child = child
        self._end = end

    def type(self, text: str) -> None:
        os.write(self._end, text.encode())

    def interrupt(self) -> None:
        """Ctrl-C at the prompt, which Python sees only while it waits for a key: right behind one it is missed."""
        time.sleep(0.5)
        self.type("\x03")

    def until(self, pattern: str, seconds: float = 60) -> str:
        """All that it shows up to what matches."""
        shown, until = b"", time.monotonic() + seconds
        while re.search(pattern.encode(), shown) is None:
            assert time.monotonic() < until, shown
            if select.select([self._end], [], [], 0.1)[0]:
                shown += os.read(self._end, 65536)
        return shown.decode(errors="replace")

    def ended(self) -> int:
        """Its exit status."""
        return self.child.wait(timeout=60)


@contextmanager
def terminal(*arguments: str) -> Iterator[Terminal]:
    end, other = pty.openpty()
    try:
        with subprocess.Popen(
            [sys.executable, "-c", STARTS, "chat", *arguments],
            cwd=ROOT,
            env=os.environ | {"TERM": "dumb"},
            stdin=other,
            stdout=other,
            stderr=other,
            start_new_session=True,
        ) as child:
            try:
                yield Terminal(child, end)
            finally:
                child.kill()
    finally:
        os.close(end)
        os.close(other)


@pytest.mark.parametrize("taken", [1, 4])
def test_ctrl_c_ends_an_answer_and_keeps_what_was_said(
    command: Any, chat_model: str, book: str, taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def take(self: Sequence, *given: Any, take: Any = Sequence.take) -> str:
        nonlocal calls
        calls += 1
        if calls == taken:
            signal.raise_signal(signal.SIGINT)
        return take(self, *given)

    with opened(chat_model) as session:
        stream = session.stream(QUESTIONS[0], max_new_tokens=NEW)
        first = "".join(next(stream) for _ in range(taken))
        stream.close()
        second = asked(session, QUESTIONS[1])[0]
    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(Sequence, "take", take)
        ended = command("chat", *CPU, "--model", chat_model, "--prompt-file", book, typed=lines(*QUESTIONS[:2]))
    assert signal.getsignal(signal.SIGINT) is before
    assert ended.status == 0 and "interrupted; what was said so far is kept, and /undo forgets it" in ended.err
    assert ended.out == printed(first) + printed(second)


def test_ctrl_c_while_a_question_is_read_forgets_it(
    command: Any, chat_model: str, book: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*given: Any, prefill: Any = ds_offload.conversation.prefill, **options: Any) -> Any:
        monkeypatch.setattr(ds_offload.conversation, "prefill", prefill)
        signal.raise_signal(signal.SIGINT)
        return prefill(*given, **options)

    with opened(chat_model) as session:
        expected = asked(session, QUESTIONS[1])[0]
    monkeypatch.setattr(ds_offload.conversation, "prefill", interrupted)
    common = ("--model", chat_model, "--prompt-file", book)
    ended = command("chat", *CPU, *common, typed=lines(*QUESTIONS[:2], "/undo", "/undo"))
    assert ended.out == "\n" + printed(expected)
    assert "interrupted; the question is forgotten" in ended.err and ended.err.count("nothing to undo") == 1
    # Nobody types at a pipe: there it ends the command.
    monkeypatch.setattr(ds_offload.conversation, "prefill", interrupted)
    ended = command("chat", *CPU, *common, stdin=lines(*QUESTIONS))
    assert ended.status == 130 and ended.error_lines[-1] == "ds-offload: interrupted"


def test_ctrl_c_while_a_command_works_loses_nothing(
    command: Any, chat_model: str, book: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ds_offload.session.write_session", save)
    with opened(chat_model) as session:
        expected = printed(asked(session, QUESTIONS[0])[0])
    common = ("chat", *CPU, "--model", chat_model, "--prompt-file", book)
    ended = command(*common, typed=lines(f"/save {tmp_path / 'new'}", QUESTIONS[0]))
    assert ended.status == 0 and ended.out == expected and "ds-offload: interrupted\n" in ended.err
    assert command(*common, stdin=lines(f"/save {tmp_path / 'new'}", QUESTIONS[0])).status == 130


def test_a_terminal(chat_model: str, book: str) -> None:
    """The prompt, a line that goes on, Ctrl-C in an answer, a line that is cleared, and twice at the prompt."""
    pytest.importorskip("readline")
    with terminal("--device", "cpu", "--model", chat_model, "--prompt-file", book, "--max-new-tokens", "250") as shown:
        start = shown.until(PROMPT)
        assert "of 512 tokens, room for" in start and "/help lists the commands" in start
        shown.type("Who \\\n")
        assert shown.until(r"\.\.\. $").endswith("... ")
        shown.type("wrote it?\n")
        shown.until(r"wrote it\?\r\n\s*\S")
        shown.type("\x03")
        assert "what was said so far is kept" in shown.until(PROMPT)
        for _ in range(3):
            shown.type("half a question")
            shown.until("half a question")
            shown.interrupt()
            assert "(Ctrl-C once more, or Ctrl-D, ends the conversation)" in shown.until(PROMPT)
        shown.type("/undo\n")
        assert "the last question is forgotten" in shown.until(PROMPT)
        shown.interrupt()
        shown.until(PROMPT)
        shown.interrupt()
        shown.until("ds-offload: interrupted")
        assert shown.ended() == 130


def test_a_terminal_that_ends_the_input(chat_model: str) -> None:
    with terminal(*CPU, "--model", chat_model) as shown:
        shown.until(PROMPT)
        shown.type("\x04")
        assert shown.ended() == 0
