"""Where saved sessions are: a name in the sessions' folder, or a path."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ds_offload.cache_folder import cache_folder
from ds_offload.errors import InputError
from ds_offload.given_path import given_path

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def sessions_folder(given: str | None) -> Path:
    """The folder of named sessions: `given`, else one in the cache folder. It may not exist yet.

    Raises:
        InputError: `given` is empty.
    """
    return cache_folder() / "sessions" if given is None else given_path(given, "sessions_dir").absolute()


def session_path(name: str, sessions_dir: str | None) -> Path:
    """The folder of the session that a user calls `name`; one with a slash or a leading ~ is a path.

    Raises:
        InputError: It is neither a path nor a name, or a path beside `sessions_dir`.
    """
    if os.sep in name or name.startswith("~"):
        if sessions_dir is not None:
            raise InputError(
                f"{name} is the path of a session, and --sessions-dir {sessions_dir!r} is for names; "
                "leave one of them out"
            )
        return Path(os.path.expanduser(name)).absolute()
    if _NAME.fullmatch(name) is None:
        raise InputError(
            f"{name[:100]!r} is no name of a session; give letters, digits, dots, dashes and underlines, "
            "the first a letter or a digit, or a path such as ./book"
        )
    return sessions_folder(sessions_dir) / name
