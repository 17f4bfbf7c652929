"""Generators of a tiny model, and prompts of unequal lengths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ds_offload import OffloadConfig, OffloadedGenerator

NEW = 16
LENGTHS = (150, 37, 201)


def make(folder: Path, **changes: Any) -> OffloadedGenerator:
    config = OffloadConfig(**({"max_context": 1024, "sink_tokens": 2, "recent_tokens": 4} | changes))
    return OffloadedGenerator.from_pretrained(str(folder), config=config, device="cpu")
