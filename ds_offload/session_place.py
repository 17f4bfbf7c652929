"""The folder of a saved session: held by one writer at a time, replaced as a whole, put back after a kill, removed."""

from __future__ import annotations

import glob
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ds_offload.errors import InputError
from ds_offload.file_lock import locked
from ds_offload.tensor_file import sync_folder

HEADER = "session.json"
# Of a folder beside a session: what is being written or removed, and what was there before. Numbers of processes are
# what earlier versions called them by.
_BESIDE = re.compile(r"[0-9a-f]{8}|[0-9]+")
# Of a session's files, damaged or not.
_FILE = re.compile(r"session\.json|(layer-\d{4,}|labels|window|calibration)\.safetensors")


def check_place(folder: Path) -> None:
    """Refuse a place where something else than a session is, or where no folder can be made.

    Raises:
        InputError: It is such a place.
    """
    if (folder / HEADER).is_file():
        return
    if os.path.lexists(folder):
        raise InputError(f"{folder} is there already and is no session; give another path")
    above = next(parent for parent in folder.absolute().parents if os.path.lexists(parent))
    if not above.is_dir():
        raise InputError(f"cannot make the session {folder}: {above} is no folder; give another path")
    if not os.access(above, os.W_OK | os.X_OK):
        raise InputError(f"cannot make the session {folder}: {above} is not writable; give another path")


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keeps other threads, processes and containers from saving to `folder` or removing it; a crash frees it.

    Waits, and says so, while another has it. What a killed one has left beside the folder is put back or removed.
    """
    waiting = f"another process is writing the session {folder}; waiting for it"
    with locked(folder.with_name(f".{folder.name}.lock"), waiting):
        for kind in ("old", "tmp"):
            for left in _beside(folder, kind):
                if kind == "old" and not folder.exists():
                    os.rename(left, folder)
                else:
                    _remove(left, folder)
        yield


def recover(folder: Path) -> None:
    """Put a session back that a process had moved away to replace it when it was killed; a link is followed."""
    folder = Path(os.path.realpath(folder))
    if not folder.exists() and _beside(folder, "old"):
        # Where nothing may be written, it is not there.
        with suppress(OSError), held(folder):
            pass


def beside(folder: Path, kind: str) -> Path:
    """A new name beside `folder`; `kind` is "tmp" or "old"."""
    return folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.{kind}")


def put(temporary: Path, folder: Path) -> None:
    """Rename a folder into its place, which is held; what is there goes behind that."""
    old = beside(folder, "old") if folder.exists() else None
    try:
        if old is not None:
            os.rename(folder, old)
        os.rename(temporary, folder)
    except BaseException:
        if old is not None and old.exists() and not folder.exists():
            os.rename(old, folder)
        raise
    sync_folder(folder.parent)
    if old is not None:
        _remove(old, folder)


def remove_session(folder: Path) -> None:
    """Delete a session, damaged or not; it is gone at once. A link to it goes, too.

    Raises:
        InputError: There is none, it holds other things, too, or it may not be deleted.
    """
    recover(folder)
    if not (folder / HEADER).is_file():
        raise InputError(f"{folder} is no session; `ds-offload session list` names them")
    others = sorted(file.name for file in folder.iterdir() if _FILE.fullmatch(file.name) is None)
    if others:
        raise InputError(f"{folder} holds {others[0]}, which is not the session's; move that away first")
    real = Path(os.path.realpath(folder))
    gone = beside(real, "tmp")
    try:
        with held(real):
            os.rename(real, gone)
            shutil.rmtree(gone)
        if folder.is_symlink():
            folder.unlink()
    except OSError as error:
        raise InputError(f"cannot remove {folder}: {error.strerror}; change its permissions") from None


def _remove(left: Path, folder: Path) -> None:
    """Remove what stands beside `folder`; a part of it that stays is never put back in its place."""
    gone = left if left.suffix == ".tmp" else beside(folder, "tmp")
    with suppress(OSError):
        if gone != left:
            os.rename(left, gone)
        shutil.rmtree(gone, ignore_errors=True)


def _beside(folder: Path, kind: str) -> list[Path]:
    """Folders that `beside` has named."""
    begin, end = f".{folder.name}.", f".{kind}"
    found = folder.parent.glob(f"{glob.escape(begin)}*{end}")
    return [path for path in found if _BESIDE.fullmatch(path.name.removeprefix(begin).removesuffix(end))]
