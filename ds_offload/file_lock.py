"""A lock on something in a folder that threads, processes and containers share; a crash frees it."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from ds_offload.notices import notice, warn

# What a disk without locks answers.
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}


@contextmanager
def locked(path: Path, waiting: str) -> Iterator[None]:
    """Holds the lock file `path`, which is there for as long; says `waiting` and waits while another has it.

    Raises:
        OSError: The file cannot be made.
    """
    stream = _take(path, waiting)
    try:
        yield
    finally:
        # Whoever waits for it finds it gone, and makes another.
        with suppress(OSError):
            path.unlink()
        stream.close()


def _take(path: Path, waiting: str) -> IO[bytes]:
    """The lock's file, locked."""
    waited = False
    while True:
        stream = _open(path)
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | (0 if waited else fcntl.LOCK_NB))
        except BlockingIOError:
            stream.close()
            notice(waiting)
            waited = True
            continue
        except OSError as error:
            if error.errno in _NO_LOCKS:
                warn(f"the disk of {path.parent} has no locks: let no other process write there meanwhile")
                return stream
            stream.close()
            raise
        # It may be that of a holder before, which has removed it.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), os.fstat(stream.fileno())):
                return stream
        stream.close()


def _open(path: Path) -> IO[bytes]:
    """The lock's file; another user's, of a process that was killed, may be locked all the same."""
    try:
        return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "rb+", 0)
    except PermissionError:
        if not path.exists():
            raise
        return open(path, "rb")
