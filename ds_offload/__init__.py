"""Decode over ultra-long contexts on one GPU, with the KV cache in host memory.

Importing this package is cheap: torch and transformers load with the first
name that needs them.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

_HERE = Path(__file__).resolve().parent
if not (_HERE / "kernels").is_dir():
    # An uninstalled checkout: kernels/, memory/ and prefetch/ stand beside this folder.
    __path__.append(str(_HERE.parent))

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ds_offload.config import OffloadConfig as OffloadConfig
    from ds_offload.errors import InputError as InputError
    from ds_offload.generation import GenerationOutput as GenerationOutput
    from ds_offload.generator import OffloadedGenerator as OffloadedGenerator

_EXPORTS = {
    "OffloadConfig": "ds_offload.config",
    "InputError": "ds_offload.errors",
    "GenerationOutput": "ds_offload.generation",
    "OffloadedGenerator": "ds_offload.generator",
}

__all__ = ["GenerationOutput", "InputError", "OffloadConfig", "OffloadedGenerator", "__version__"]


def __getattr__(name: str) -> Any:
    module = _EXPORTS.get(name)
    if module is None:
        raise AttributeError(f"module 'ds_offload' has no attribute {name!r}")
    return getattr(importlib.import_module(module), name)
