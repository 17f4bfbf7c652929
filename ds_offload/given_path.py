"""A path that the user gave."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ds_offload.errors import InputError

LONGEST_NAME = 255  # bytes, of Linux's file systems


def check_path(value: Any, field: str) -> str:
    """`value` as the text of a path.

    Raises:
        InputError: It is no text and no `os.PathLike` of a text, empty, or has a NUL character or too long a name.
    """
    path = os.fspath(value) if isinstance(value, str | os.PathLike) else value
    if not isinstance(path, str):
        raise InputError(f"{field}={value!r:.60} is no path; give a text or a pathlib.Path")
    if not path:
        raise InputError(f"{field}='' is empty; give a path, or leave it out")
    if "\0" in path:
        raise InputError(f"{field}={path!r:.60} has a NUL character, which no path has; give another one")
    longest = max(len(os.fsencode(name)) for name in path.split(os.sep))
    if longest > LONGEST_NAME:
        raise InputError(f"{field}={path!r} is too long: a name in it has {longest} bytes; give at most {LONGEST_NAME}")
    return path


def given_path(value: Any, field: str) -> Path:
    """`value` as a path, `~` expanded; InputError as `check_path`."""
    return Path(os.path.expanduser(check_path(value, field)))
