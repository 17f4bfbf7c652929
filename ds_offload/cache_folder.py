"""Where models and calibrations made on this machine are kept."""

from __future__ import annotations

import os
from pathlib import Path

from ds_offload.errors import InputError


def cache_folder() -> Path:
    """The cache's root: `DS_OFFLOAD_CACHE` where set, else ~/.cache/ds_offload. It may not exist yet.

    Raises:
        InputError: The first is not set, and there is no home folder.
    """
    moved = os.environ.get("DS_OFFLOAD_CACHE")
    if moved:
        # Unlike a path's own method it leaves ~NAME as it is where there is no such user, as a shell does.
        return Path(os.path.expanduser(moved)).absolute()
    home = os.path.expanduser("~")
    if home == "~":
        raise InputError("this user has no home folder to keep models in; set DS_OFFLOAD_CACHE to a folder")
    return Path(home) / ".cache" / "ds_offload"
