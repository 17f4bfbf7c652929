"""One tensor in a safetensors file, written and read in parts, whole or not at all, with its checksum."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from ds_offload.errors import LoadError

_READ_BYTES = 4 << 20
_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.uint8: "U8"}


@dataclass(frozen=True)
class FileRecord:
    """A file's bytes and their SHA-256 in hex."""

    nbytes: int
    sha256: str


def write_file(path: Path, parts: Iterable[bytes | memoryview]) -> FileRecord:
    """Write a file in one step: under a name of its own, flushed to the disk, then renamed.

    Raises:
        OSError: It could not be written; what was at `path` is as it was, and nothing is left beside it.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    digest = hashlib.sha256()
    nbytes = 0
    try:
        with open(temporary, "wb") as file:
            for part in parts:
                _write(file, part)
                digest.update(part)
                nbytes += len(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    return FileRecord(nbytes, digest.hexdigest())


def write_tensor(path: Path, dtype: torch.dtype, shape: tuple[int, ...], parts: Iterable[Tensor]) -> FileRecord:
    """Write a tensor `rows` of that shape from contiguous parts that follow each other; on any device.

    Raises:
        OSError: As `write_file`.
    """

    def content() -> Iterable[bytes | memoryview]:
        yield _header(dtype, shape)
        for part in parts:
            yield _bytes(part.cpu())

    return write_file(path, content())


def read_tensor(
    path: Path, record: FileRecord, dtype: torch.dtype, shape: tuple[int, ...], parts: Iterable[Tensor]
) -> None:
    """Fill contiguous parts that follow each other, on any device, with what `write_tensor` wrote.

    Raises:
        LoadError: The file is not there, or not the one that was written.
    """
    digest = hashlib.sha256()
    header = _header(dtype, shape)
    try:
        with open(path, "rb") as file:
            found = file.read(len(header))
            digest.update(found)
            for part in parts:
                target = part if part.device.type == "cpu" else torch.empty_like(part, device="cpu")
                data = _bytes(target)
                if file.readinto(data) != len(data):
                    raise LoadError(f"{path} is cut short")
                digest.update(data)
                if target is not part:
                    part.copy_(target)
            rest = file.read(1)
    except OSError as error:
        raise LoadError(f"cannot read {path}: {error.strerror}") from None
    if found != header or rest or digest.hexdigest() != record.sha256:
        raise LoadError(f"{path} is damaged: its checksum is another one")


def check_file(path: Path, record: FileRecord) -> None:
    """Read a file and hold it to its record.

    Raises:
        LoadError: It is not there, or not the one that was written.
    """
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while data := file.read(_READ_BYTES):
                digest.update(data)
    except OSError as error:
        raise LoadError(f"cannot read {path}: {error.strerror}") from None
    if digest.hexdigest() != record.sha256:
        raise LoadError(f"{path} is damaged: its checksum is another one")


def check_size(path: Path, record: FileRecord) -> None:
    """Refuse a file of another size than was written, without reading it.

    Raises:
        LoadError: It is not there, cut short or longer.
    """
    if not path.is_file():
        raise LoadError(f"{path} is missing")
    size = path.stat().st_size
    if size != record.nbytes:
        raise LoadError(f"{path} has {size:,} bytes and {record.nbytes:,} were written")


def _header(dtype: torch.dtype, shape: tuple[int, ...]) -> bytes:
    """The beginning of a safetensors file with one tensor (the format's own description: 8 bytes of length, JSON)."""
    nbytes = dtype.itemsize * torch.Size(shape).numel()
    entry = {"rows": {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [0, nbytes]}}
    text = json.dumps(entry, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes(part: Tensor) -> memoryview:
    return part.view(torch.uint8).numpy().data.cast("B")


def _write(file: BinaryIO, part: bytes | memoryview) -> None:
    file.write(part)


def sync_folder(folder: Path) -> None:
    """Make a rename last, where the system lets a folder be flushed."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
