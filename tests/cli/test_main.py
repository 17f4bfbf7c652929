"""Exit statuses, the one line of every error, help, and how fast it is there."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

import ds_offload
from ds_offload.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ("run", "summarize", "calibrate")


def process(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **options,
    )


def test_alone_it_prints_help(command: Any) -> None:
    ended = command()
    assert ended.status == 0 and ended.err == ""
    assert all(name in ended.out for name in COMMANDS)
    assert command("--help").out.split() == ended.out.split()


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command(command: Any, name: str) -> None:
    ended = command(name, "--help")
    assert ended.status == 0 and ended.err == ""
    assert "--model" in ended.out and "--debug" in ended.out


def test_version(command: Any) -> None:
    assert command("--version").out == f"ds-offload {ds_offload.__version__}\n"


def test_help_needs_neither_torch_nor_transformers() -> None:
    script = (
        "import sys; from ds_offload.cli.main import main; status = main(['run', '--help']); "
        "sys.exit(status or sorted({'torch', 'transformers', 'numpy', 'numba'} & set(sys.modules)) or None)"
    )
    ended = process("-c", script)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["ran"], ("'ran'", "'run'", "ds-offload --help")),
        (["--verbose"], ("--verbose", "ds-offload --help")),
        (["run", "--promt", "x"], ("--promt", "--prompt", "ds-offload run --help")),
        (["run", "--prompt"], ("--prompt", "argument")),
        (["run", "more"], ("more", "ds-offload run --help")),
        (["summarize"], ("FILE", "ds-offload summarize --help")),
    ],
)
def test_bad_usage_is_one_line(refused: Any, arguments: list[str], words: tuple[str, ...]) -> None:
    line = refused(*arguments).err
    assert all(word in line for word in words), line


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """From here on loading a model raises `error`."""

    def find(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("ds_offload.preparation.PreparedModel.find", find)


RUN = ("run", "--prompt", "1 2 3")


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (RuntimeError("two\n  lines"), 1, "failed: RuntimeError: two lines; --debug shows where"),
        (MemoryError(), 1, "failed: MemoryError; --debug shows where"),
        (KeyError("k"), 1, "failed: KeyError: 'k'; --debug shows where"),
        (OSError(errno.EIO, "Broken", "f"), 1, "failed: OSError: [Errno 5] Broken: 'f'; --debug shows where"),
        (PermissionError(errno.EACCES, "No"), 1, "failed: PermissionError: [Errno 13] No; --debug shows where"),
        (PermissionError(errno.EACCES, "No", "f"), 2, "error: cannot use f: No; give another path"),
        (OSError(errno.EROFS, "No", Path("f")), 2, "error: cannot use f: No; give another path"),
        (ds_offload.InputError("max_context=1\nis wrong"), 2, "error: max_context=1 is wrong"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (typer.Abort(), 130, "interrupted"),
    ],
)
def test_what_goes_wrong(
    command: Any, monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int, line: str
) -> None:
    failing(monkeypatch, error)
    ended = command(*RUN)
    assert (ended.status, ended.out, ended.err) == (status, "", f"ds-offload: {line}\n")


def test_a_very_long_reason_is_cut(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, RuntimeError("x" * 100_000))
    assert len(command(*RUN).err) < 1000


@pytest.mark.parametrize("arguments", [("--debug", *RUN), (*RUN, "--debug")])
@pytest.mark.parametrize("error", [RuntimeError("broken"), ds_offload.InputError("wrong")])
def test_debug_shows_the_traceback(
    command: Any, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], error: Exception
) -> None:
    failing(monkeypatch, error)
    ended = command(*arguments)
    assert "Traceback (most recent call last)" in ended.err and "in find" in ended.err
    assert ended.error_lines[-1].startswith("ds-offload: ") and str(error) in ended.error_lines[-1]
    assert "--debug" not in ended.error_lines[-1]


def test_a_reader_that_goes_away() -> None:
    """`ds-offload run ... | head -0`: no traceback, and no complaint when the interpreter ends."""
    script = (
        "import os, sys; from ds_offload.cli import main as cli\n"
        "reading, writing = os.pipe(); os.close(reading); os.dup2(writing, 1)\n"
        "sys.exit(cli.main(['--help']))"
    )
    ended = process("-c", script)
    assert (ended.returncode, ended.stderr) == (1, "")


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_without_standard_output(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], ids_model: str, options: tuple[str, ...]
) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["run", "--prompt", ""]) == 2
    capsys.readouterr()
    monkeypatch.setattr(sys, "stdout", None)
    assert main([*RUN, "--model", ids_model, "--device", "cpu", "--max-new-tokens", "2", *options]) == 0
    assert "failed" not in capsys.readouterr().err


@pytest.mark.parametrize(("closed", "status"), [(1, 0), (2, 2)])
def test_a_stream_that_the_shell_has_closed(closed: int, status: int) -> None:
    """`>&-` and `2>&-`: what goes to one stream does not come out of the other."""
    line = f'exec "$0" -m ds_offload {"--help" if status == 0 else "ran"} {closed}>&-'
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(["sh", "-c", line, sys.executable], env=environment, capture_output=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (status, b"", b"")


def test_text_that_the_terminal_cannot_show() -> None:
    """An ASCII terminal gets question marks instead of an error."""
    script = (
        "import sys; import ds_offload.cli.main as cli\n"
        "cli.app.command('shout')(lambda: print('\\u00e9\\U0001f40b'))\n"
        "sys.exit(cli.main(['shout']))"
    )
    ended = process("-X", "utf8=0", "-c", script)
    assert ended.returncode == 0, ended.stderr
    environment = {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]}
    plain = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, check=False)
    assert (plain.returncode, plain.stdout) == (0, b"??\n")
