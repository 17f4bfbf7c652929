"""Paths that the system refuses: too long a name, or a folder that may not be entered."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

RUN = ("run", "--device", "cpu", "--prompt", "1 2 3")
COMMANDS = {
    "model": (*RUN, "--model", "PATH"),
    "gguf": (*RUN, "--model", "PATH.gguf"),
    "calibration": (*RUN, "--model", "MODEL", "--calibration", "PATH"),
    "trace": (*RUN, "--model", "MODEL", "--trace", "PATH", "--max-new-tokens", "9"),
    "kv-dir": (*RUN, "--model", "MODEL", "--kv-dir", "PATH"),
    "checkpoint": (*RUN, "--model", "MODEL", "--checkpoint", "PATH"),
    "session": (*RUN, "--model", "MODEL", "--question", "4", "--session", "PATH"),
    "session list": ("session", "list", "PATH"),
    "session show": ("session", "show", "PATH"),
    "session rm": ("session", "rm", "PATH"),
    "sessions-dir": ("session", "list", "--sessions-dir", "PATH"),
    "longbench": ("eval", "longbench", "--model", "MODEL", "--device", "cpu", "--data", "PATH"),
    "mmlu": ("eval", "mmlu", "--model", "MODEL", "--device", "cpu", "--data", "PATH"),
}


def arguments(name: str, path: str, model: str) -> list[str]:
    return [part.replace("PATH", path).replace("MODEL", model) for part in COMMANDS[name]]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_name_that_is_too_long(refused: Callable[..., Any], ids_model: str, name: str) -> None:
    ended = refused(*arguments(name, f"./{'n' * 300}", ids_model))
    assert "n" * 300 in ended.err and ("too long" in ended.err or "no file" in ended.err or "no folder" in ended.err)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_folder_that_may_not_be_entered(
    refused: Callable[..., Any], ids_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """As another user than root finds it."""
    shut = tmp_path / "shut"
    shut.mkdir()
    stat, mkdir, open_file = os.stat, os.mkdir, os.open

    def refusing(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *more: Any, **options: Any) -> Any:
            if isinstance(path, str | Path) and Path(path).is_relative_to(shut) and Path(path) != shut:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return function(path, *more, **options)

        return call

    monkeypatch.setattr(os, "stat", refusing(stat))
    monkeypatch.setattr(os, "mkdir", refusing(mkdir))
    monkeypatch.setattr(os, "open", refusing(open_file))
    ended = refused(*arguments(name, f"{shut}/there", ids_model))
    assert f"{shut}/there" in ended.err
