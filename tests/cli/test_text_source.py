"""Prompts from the command line, from files and through pipes."""

from __future__ import annotations

import io
import os
import socket
import sys
from pathlib import Path

import pytest

from ds_offload.cli.text_source import read_prompt, read_redirected, read_text_file
from ds_offload.errors import InputError


class NoTerminal:
    def __init__(self, data: bytes) -> None:
        self.buffer = self
        self.data = data

    def read(self) -> bytes:
        return self.data

    def isatty(self) -> bool:
        return False


def test_a_file_is_read_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_bytes("first\r\nzweite Zeile: é 🐋\n".encode())
    assert read_text_file(str(file)) == "first\r\nzweite Zeile: é 🐋\n"
    file.write_bytes(b"\xef\xbb\xbfwith a byte order mark")
    assert read_text_file(str(file)) == "with a byte order mark"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is empty"),
        (b" \n\t ", "only white space"),
        (b"text\0more", "binary"),
        (b"\x7fELF\x02\x01\x01\x00", "binary"),
        ("sixteen".encode("utf-16"), "binary"),
        (b"caf\xe9", "not UTF-8 text (byte 3)"),
    ],
)
def test_files_that_are_no_text(tmp_path: Path, data: bytes, words: str) -> None:
    file = tmp_path / "text.txt"
    file.write_bytes(data)
    with pytest.raises(InputError) as caught:
        read_text_file(str(file))
    assert words in str(caught.value) and "text.txt" in str(caught.value)


def test_paths_that_are_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        read_text_file(str(tmp_path / "missing.txt"))
    with pytest.raises(InputError, match="is a folder"):
        read_text_file(str(tmp_path))
    with pytest.raises(InputError, match="cannot be read"):
        read_text_file("a\0b")
    with pytest.raises(InputError, match="cannot be read"):
        read_text_file("x" * 5000)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_permission(tmp_path: Path) -> None:
    file = tmp_path / "secret.txt"
    file.write_text("text")
    file.chmod(0)
    with pytest.raises(InputError, match="may not be read"):
        read_text_file(str(file))


def test_where_the_prompt_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "text.txt"
    file.write_text("from the file")
    monkeypatch.setattr(sys, "stdin", NoTerminal(b"from the pipe"))
    assert read_prompt("given", None) == "given"
    assert read_prompt(None, str(file)) == "from the file"
    assert read_prompt(None, None) == read_prompt("-", None) == read_prompt(None, "-") == "from the pipe"


def test_no_prompt_or_two(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="both given"):
        read_prompt("given", "file")
    with pytest.raises(InputError, match="--prompt is empty"):
        read_prompt("", None)
    monkeypatch.setattr(sys, "stdin", NoTerminal(b""))
    with pytest.raises(InputError, match="standard input is empty"):
        read_prompt(None, None)
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(InputError, match="no prompt was given"):
        read_prompt(None, None)
    with pytest.raises(InputError, match="closed"):
        read_prompt(None, "-")


def test_bytes_of_the_command_line_that_are_no_text() -> None:
    with pytest.raises(InputError, match="not UTF-8"):
        read_prompt(os.fsdecode(b"caf\xe9"), None)


def redirected(number: int, monkeypatch: pytest.MonkeyPatch) -> str | None:
    """What is read with the file of this number as standard input; it is closed behind that."""
    with os.fdopen(number, encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        return read_redirected()


def test_a_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "text.txt"
    file.write_text("from a file")
    assert redirected(os.open(file, os.O_RDONLY), monkeypatch) == "from a file"
    file.write_bytes(b"bin\0ary")
    with pytest.raises(InputError, match="standard input is binary"):
        redirected(os.open(file, os.O_RDONLY), monkeypatch)


def test_a_pipe_is_left_alone_and_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """As in `cat questions | while read question; do ds-offload run --session ...; done`."""
    end, other = os.pipe()
    os.write(other, b"second\n")
    kept = os.dup(end)
    assert redirected(end, monkeypatch) is None
    assert os.read(kept, 100) == b"second\n"
    here, there = socket.socketpair()
    there.sendall(b"through a socket")
    assert redirected(here.detach(), monkeypatch) is None
    there.close()
    assert capsys.readouterr().err.count("what comes through the pipe is not read; --prompt-file - reads it") == 2
    for number in (kept, other):
        os.close(number)


def test_where_nothing_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    end, other = os.pipe()
    os.close(other)
    idle, open_end = os.pipe()
    (tmp_path / "empty").touch()
    files = [os.open(tmp_path / "empty", os.O_RDONLY), os.open(os.devnull, os.O_RDONLY)]
    for number in (end, idle, *files, os.openpty()[1]):
        assert redirected(number, monkeypatch) is None
    os.close(open_end)
    for stream in (None, io.StringIO("no descriptor")):
        monkeypatch.setattr(sys, "stdin", stream)
        assert read_redirected() is None
    assert capsys.readouterr().err == ""


def test_a_file_that_a_shell_reads_on_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in `while read question; do ds-offload run --session ...; done < questions`."""
    file = tmp_path / "questions.txt"
    file.write_text("first\nsecond\n")
    number = os.open(file, os.O_RDONLY)
    os.read(number, len("first\n"))
    other = os.dup(number)
    assert redirected(number, monkeypatch) is None
    assert os.read(other, 100) == b"second\n"
    os.close(other)
