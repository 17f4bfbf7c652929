"""What a .gguf file says beside what transformers takes from it: its metadata, and which tensors it has."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFReader, GGUFValueType

from ds_offload.checkpoint_folder import one_line
from ds_offload.errors import LoadError

# llama.cpp keeps Llama 3's scaling of RoPE as a tensor: what each frequency is divided by.
FREQUENCY_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class GGUFHeader:
    """Metadata and tensors of a file.

    Attributes:
        values: Numbers and texts by key, no arrays.
        tensors: Names of all tensors.
        frequency_factors: The tensor `FREQUENCY_FACTORS`, where there is one.
    """

    values: dict[str, Any]
    tensors: frozenset[str]
    frequency_factors: tuple[float, ...] | None


def read_gguf_header(path: Path) -> GGUFHeader:
    """Read the header of a file, once in a process: that of a large vocabulary takes seconds.

    Raises:
        LoadError: It cannot be read, or is no such file.
    """
    try:
        return _read(path, os.stat(path).st_mtime_ns)
    except Exception as error:
        raise LoadError(f"{path} cannot be read as GGUF: {one_line(error)}; give a whole .gguf file") from error


@functools.lru_cache(maxsize=1)
def _read(path: Path, changed: int) -> GGUFHeader:
    reader = GGUFReader(path)
    values = {
        name: field.contents()
        for name, field in reader.fields.items()
        if field.types and field.types[0] != GGUFValueType.ARRAY and not name.startswith("GGUF.")
    }
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    factors = tensors.get(FREQUENCY_FACTORS)
    return GGUFHeader(values, frozenset(tensors), None if factors is None else tuple(factors.data.tolist()))
