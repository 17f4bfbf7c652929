"""A session in a folder, written as a whole or not at all, and read straight into a context."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from ds_offload.calibration import Calibration
from ds_offload.context_copy import fill_window, synchronize
from ds_offload.errors import InputError, LoadError
from ds_offload.kv_context import KVContext
from ds_offload.session_header import REMEDY, SessionHeader, calibration_digest
from ds_offload.session_place import HEADER, beside, check_place, held, put, recover
from ds_offload.tensor_file import FileRecord, check_file, read_tensor, write_file, write_tensor

LABELS = "labels.safetensors"
WINDOW = "window.safetensors"
CALIBRATION = "calibration.safetensors"
# Files read or written at a time: their checksums take a core each.
_THREADS = 8

Item = TypeVar("Item")
Result = TypeVar("Result")


class SessionWriteError(OSError):
    """A session could not be written; the one that was there before, if any, is intact."""


def write_session(folder: Path, header: SessionHeader, context: KVContext, calibration: Calibration) -> SessionHeader:
    """Save a session to `folder`, in the place of one that is there; waits for the device.

    Everything goes to a folder beside it, flushed to the disk, which is then renamed.

    Returns:
        The header with its files.

    Raises:
        InputError: Something else is there, or the disk has no room for it.
        SessionWriteError: It could not be written.
    """
    recover(folder)
    check_place(folder)
    context.streams.join()
    synchronize(context)
    real = Path(os.path.realpath(folder))
    temporary = beside(real, "tmp")
    try:
        real.parent.mkdir(parents=True, exist_ok=True)
        with held(real):
            header = _write(temporary, header, context, calibration)
            put(temporary, real)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise SessionWriteError(f"cannot write the session {folder}: {error.strerror or error}") from None
        raise
    return header


def _write(folder: Path, header: SessionHeader, context: KVContext, calibration: Calibration) -> SessionHeader:
    """Write all of a session to a new folder; the header with its files."""
    _check_room(folder, header.stored, context)
    folder.mkdir()
    files = {CALIBRATION: write_file(folder / CALIBRATION, [calibration.to_bytes()])}
    tensors = list(_tensors(context, header.stored))
    records = _in_threads(lambda one: write_tensor(folder / one.name, one.dtype, one.shape, one.parts()), tensors)
    files |= {one.name: record for one, record in zip(tensors, records, strict=True)}
    header = dataclasses.replace(header, files=files)
    write_file(folder / HEADER, [header.to_bytes()])
    return header


def read_calibration(folder: Path, header: SessionHeader) -> Calibration:
    """The calibration that a session's labels and codes were made by.

    Raises:
        LoadError: It is damaged.
    """
    with _naming_the_remedy():
        check_file(folder / CALIBRATION, _record(folder, header, CALIBRATION))
        calibration = Calibration.load(folder / CALIBRATION, header.identity.model)
        if calibration_digest(calibration, header.identity.quantised) != header.calibration:
            raise LoadError(f"{folder / CALIBRATION} is damaged: it is another one")
    return calibration


def read_session(folder: Path, header: SessionHeader, context: KVContext) -> None:
    """Fill a new context with a session's tokens; every file is read once, to where it stays.

    Raises:
        LoadError: A file is damaged.
    """
    context.reserve(0, header.stored)
    # Behind whatever makes its buffers.
    synchronize(context)
    tensors = list(_tensors(context, header.stored))
    with _naming_the_remedy():
        records = [_record(folder, header, one.name) for one in tensors]
        _in_threads(
            lambda job: read_tensor(folder / job[0].name, job[1], job[0].dtype, job[0].shape, job[0].parts()),
            list(zip(tensors, records, strict=True)),
        )
    # Other threads copied what belongs on the device.
    synchronize(context)
    if context.codec is None:
        fill_window(context, header.stored)


def verify_session(folder: Path) -> SessionHeader:
    """Read all of a session and hold every file to its checksum; returns its header.

    Raises:
        LoadError: Something is missing or damaged.
    """
    recover(folder)
    header = SessionHeader.read(folder)
    with _naming_the_remedy():
        _in_threads(lambda item: check_file(folder / item[0], item[1]), list(header.files.items()))
    read_calibration(folder, header)
    return header


@dataclasses.dataclass(frozen=True)
class _StoredTensor:
    """One file's tensor, in contiguous parts that lie in a context."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: Callable[[], Iterable[Tensor]]


def _tensors(context: KVContext, tokens: int) -> Iterator[_StoredTensor]:
    """K/V of every layer, by KV head, then by token, the labels, and of quantised K/V the window as it is."""
    labels = context.labels.rows

    def rows_of(layer: int) -> Callable[[], Iterable[Tensor]]:
        return lambda: context.row_parts(layer, 0, tokens)

    for layer in range(context.layers):
        dtype, stored = context.stored_as(layer, tokens)
        yield _StoredTensor(f"layer-{layer:04d}.safetensors", dtype, stored, rows_of(layer))
    shape = (labels.shape[0], labels.shape[1], tokens, labels.shape[3])
    yield _StoredTensor(LABELS, labels.dtype, shape, lambda: (head[:tokens] for layer in labels for head in layer))
    offloaded = [layer for layer in range(context.layers) if layer in context.store]
    window = context.window_buffer
    if context.codec is not None and window is not None and offloaded:
        rows = window.tensor(offloaded[0])
        shape = (len(offloaded), *rows.shape[1:])
        yield _StoredTensor(
            WINDOW, rows.dtype, shape, lambda: (part for layer in offloaded for part in window.parts(layer, 0))
        )


def _check_room(folder: Path, tokens: int, context: KVContext) -> None:
    needed = 0
    for one in _tensors(context, tokens):
        needed += sum(part.nbytes for part in one.parts())
    free = shutil.disk_usage(folder.parent).free
    if needed > free:
        raise InputError(
            f"the session needs {needed / 2**30:.2f} GiB of disk and {folder.parent} has {free / 2**30:.2f} GiB left; "
            "free some, or give a path on another disk"
        )


def _record(folder: Path, header: SessionHeader, name: str) -> FileRecord:
    if name not in header.files:
        raise LoadError(f"the session {folder} has no {name}")
    return header.files[name]


def _in_threads(work: Callable[[Item], Result], items: list[Item]) -> list[Result]:
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(work, items))


@contextlib.contextmanager
def _naming_the_remedy() -> Iterator[None]:
    try:
        yield
    except LoadError as error:
        raise LoadError(f"{error}; {REMEDY}") from None
