"""Paths that the system refuses: too long a name, or a folder that may not be entered."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ds_offload import InputError, OffloadedGenerator
from ds_offload.cache_folder import cache_folder

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


@pytest.mark.parametrize("name", ["model", "gguf", "session show", "session rm", "sessions-dir", "longbench", "mmlu"])
def test_the_home_of_a_user_that_is_not_there(refused: Callable[..., Any], ids_model: str, name: str) -> None:
    """As in a shell, it is a name like any other."""
    assert "~no-such-user/there" in refused(*arguments(name, "~no-such-user/there", ids_model)).err


def test_a_saved_session_in_the_home_of_no_user(ids_model: str) -> None:
    with (
        OffloadedGenerator.from_pretrained(ids_model, device="cpu") as generator,
        pytest.raises(InputError, match=r"there is no session .*/~no-such-user/book"),
    ):
        generator.load_session("~no-such-user/book")


def test_the_cache_folder_without_a_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DS_OFFLOAD_CACHE", "~no-such-user/cache")
    assert cache_folder() == tmp_path / "~no-such-user" / "cache"
    monkeypatch.delenv("DS_OFFLOAD_CACHE")
    monkeypatch.delenv("HOME", raising=False)

    def nobody(number: int) -> None:
        raise KeyError(number)

    monkeypatch.setattr("pwd.getpwuid", nobody)
    with pytest.raises(InputError, match="has no home folder to keep models in; set DS_OFFLOAD_CACHE to a folder"):
        cache_folder()
