"""Text that the user gives: on the command line, in a file, or through a pipe."""

from __future__ import annotations

import fcntl
import os
import select
import stat
import struct
import sys
import termios

from ds_offload.errors import InputError
from ds_offload.notices import notice

STDIN = "-"
PIPE_WAIT_S = 0.2  # for what comes before a pipe's first bytes


def read_text_file(path: str) -> str:
    """The text of a UTF-8 file, without its byte order mark.

    Raises:
        InputError: A file that is missing, a folder, unreadable, binary or empty.
    """
    try:
        with open(path, "rb") as file:
            data = file.read()
    except FileNotFoundError:
        raise InputError(f"file {path!r} does not exist; give the path of a text file") from None
    except IsADirectoryError:
        raise InputError(f"{path!r} is a folder; give the path of a text file") from None
    except PermissionError:
        raise InputError(f"file {path!r} may not be read; change its permissions or give another file") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise InputError(f"file {path!r} cannot be read ({reason}); give the path of a text file") from None
    return _decode(data, f"file {path!r}")


def read_stdin() -> str:
    """The text on standard input.

    Raises:
        InputError: Nothing there, or binary.
    """
    if sys.stdin is None:
        raise InputError("standard input is closed; give --prompt TEXT or --prompt-file FILE")
    return _decode(sys.stdin.buffer.read(), "standard input")


def read_redirected() -> str | None:
    """The text of a file that is standard input, as in `< FILE`; None where there is none.

    A pipe is not read, which may be a loop's over its questions, but it is said that something comes through it. A file
    of which something was read before is left alone, too.

    Raises:
        InputError: It is binary.
    """
    try:
        number = sys.stdin.fileno()
        kind = os.fstat(number).st_mode
    except (AttributeError, OSError, ValueError):
        return None  # closed, or a stream of another program's making
    if stat.S_ISFIFO(kind) or stat.S_ISSOCK(kind):
        if _holds_something(number):
            notice(
                "the session has its document, and what comes through the pipe is not read; "
                "--prompt-file - reads it and compares"
            )
        return None
    if not stat.S_ISREG(kind) or os.lseek(number, 0, os.SEEK_CUR):
        return None
    data = sys.stdin.buffer.read()
    return _decode(data, "standard input") if data.strip() else None


def _holds_something(pipe: int) -> bool:
    if not select.select([pipe], [], [], PIPE_WAIT_S)[0]:
        return False
    count = fcntl.ioctl(pipe, termios.FIONREAD, struct.pack("i", 0))
    return bool(struct.unpack("i", count)[0] > 0)


def read_prompt(prompt: str | None, prompt_file: str | None) -> str:
    """The prompt's text from the one place it was given; "-" is standard input, as is a pipe where neither is given.

    Raises:
        InputError: No prompt, two of them, or one that cannot be read or is empty.
    """
    if prompt is not None and prompt_file is not None:
        raise InputError("--prompt and --prompt-file were both given; give one of them")
    if STDIN in (prompt, prompt_file):
        return read_stdin()
    if prompt_file is not None:
        return read_text_file(prompt_file)
    if prompt is not None:
        # Bytes of the command line that are not UTF-8 come as surrogates.
        return _decode(prompt.encode("utf-8", "surrogateescape"), "--prompt")
    if sys.stdin is None or sys.stdin.isatty():
        raise InputError("no prompt was given; give --prompt TEXT, --prompt-file FILE, or pipe a text in")
    return read_stdin()


def _decode(data: bytes, what: str) -> str:
    if b"\0" in data:
        raise InputError(f"{what} is binary (it has a NUL byte); give a text in UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{what} is not UTF-8 text (byte {error.start}); convert it to UTF-8") from None
    if not text.strip():
        kind = "has only white space" if text else "is empty"
        raise InputError(f"{what} {kind}; give a text with at least one word")
    return text
