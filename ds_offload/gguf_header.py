"""What the header of a .gguf file says, but for its arrays: those of a vocabulary take the gguf package seconds."""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_offload.checkpoint_folder import one_line
from ds_offload.errors import LoadError

# Types of values: numbers by their number in the format, as `struct` names them, texts, and arrays of either.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
_FLOAT32 = 0
_ALIGNMENT = 32


@dataclass(frozen=True)
class GGUFHeader:
    """Metadata and tensors of a file.

    Attributes:
        values: Numbers and texts by key.
        tensors: Names of all tensors.
        frequency_factors: The tensor `FREQUENCY_FACTORS`, where there is one.
    """

    values: dict[str, Any]
    tensors: frozenset[str]
    frequency_factors: tuple[float, ...] | None


# llama.cpp keeps Llama 3's scaling of RoPE as a tensor: what each frequency is divided by.
FREQUENCY_FACTORS = "rope_freqs.weight"


def read_gguf_header(path: Path) -> GGUFHeader:
    """Read a little-endian file of version 2 or 3.

    Raises:
        LoadError: It cannot be read, or is no such file.
    """
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(data).header()
    except (OSError, ValueError, TypeError, LookupError, ArithmeticError, struct.error) as error:
        raise LoadError(f"{path} cannot be read as GGUF: {one_line(error)}; give a whole .gguf file") from error


class _Reader:
    """A place in the file, which moves as values are read."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._place = 0

    def header(self) -> GGUFHeader:
        magic, version, tensors, values = self._take("4sIQQ")
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(f"magic {magic!r}, version {version}")
        found = {}
        for _ in range(values):
            key, (kind,) = self._text(), self._take("I")
            value = self._value(kind)
            if value is not None:
                found[key] = value
        places = {}
        for _ in range(tensors):
            name, (dimensions,) = self._text(), self._take("I")
            places[name] = self._take(f"{dimensions}QIQ")
        factors = None
        if FREQUENCY_FACTORS in places:
            *shape, kind, offset = places[FREQUENCY_FACTORS]
            if kind != _FLOAT32 or len(shape) != 1:
                raise ValueError(f"{FREQUENCY_FACTORS} is of type {kind} and shape {shape}, not float32 and a row")
            alignment = found.get("general.alignment", _ALIGNMENT)
            self._place = -(-self._place // alignment) * alignment + offset
            factors = self._take(f"{shape[0]}f")
        return GGUFHeader(found, frozenset(places), factors)

    def _take(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{form}", self._data, self._place)
        self._place += struct.calcsize(f"<{form}")
        return values

    def _text(self) -> str:
        (length,) = self._take("Q")
        self._place += length
        return self._data[self._place - length : self._place].decode()

    def _value(self, kind: int) -> Any:
        """A number or a text; None for an array, which is passed over."""
        if kind == _TEXT:
            return self._text()
        if kind != _ARRAY:
            return self._take(_NUMBERS[kind])[0]
        kind, count = self._take("IQ")
        if kind in _NUMBERS:
            self._place += count * struct.calcsize(f"<{_NUMBERS[kind]}")
            return None
        data, place, length_of = self._data, self._place, struct.Struct("<Q").unpack_from
        if kind == _TEXT:
            for _ in range(count):
                place += 8 + length_of(data, place)[0]
            self._place = place
            return None
        for _ in range(count):
            self._value(kind)
        return None
