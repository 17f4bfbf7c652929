"""Where models and calibrations made on this machine are kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """The cache's root: `DS_OFFLOAD_CACHE` where set, else ~/.cache/ds_offload. It may not exist yet."""
    moved = os.environ.get("DS_OFFLOAD_CACHE")
    return Path(moved).expanduser().absolute() if moved else Path.home() / ".cache" / "ds_offload"
