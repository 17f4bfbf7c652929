"""Lines typed at a prompt, or come through a pipe: the questions of `ds-offload chat`."""

from __future__ import annotations

import sys
from collections.abc import Callable

from ds_offload.errors import InputError

PROMPT, FURTHER = "> ", "... "


class TypedLines:
    """Standard input line by line; a line that ends with a backslash goes on in the next one.

    On a terminal there is a prompt, with editing and a history where Python has readline. Ctrl-C there
    clears what was typed, and where nothing was typed since, the next one raises KeyboardInterrupt.

    Attributes:
        interactive: Whether standard input is a terminal.

    Raises:
        InputError: Standard input is closed.
    """

    def __init__(self) -> None:
        if sys.stdin is None:
            raise InputError("standard input is closed; chat reads its questions from there")
        self.interactive = sys.stdin.isatty()
        # Python's input edits lines only where both are terminals, and puts its prompt on stdout.
        self._edited = self.interactive and sys.stdout.isatty()
        self._number = 0
        self._begun: Callable[[], str] = str
        if self._edited:
            try:
                # From now on it serves `input`.
                import readline
            except ImportError:
                return
            self._begun = readline.get_line_buffer

    def read(self) -> str | None:
        """The next line, or lines joined; None at the end of the input.

        Raises:
            InputError: It is not UTF-8.
        """
        interrupted = False
        while True:
            try:
                return self._read()
            except KeyboardInterrupt:
                if not self.interactive or (interrupted and not self._begun()):
                    raise
                interrupted = True
                print("\n(Ctrl-C once more, or Ctrl-D, ends the conversation)", file=sys.stderr, flush=True)

    def _read(self) -> str | None:
        lines: list[str] = []
        while True:
            line = self._line(FURTHER if lines else PROMPT)
            if line is None:
                return "\n".join(lines) if lines else None
            self._number += 1
            if not line.endswith("\\"):
                return "\n".join([*lines, line])
            lines.append(line[:-1])

    def _line(self, prompt: str) -> str | None:
        try:
            return self._typed(prompt) if self.interactive else self._piped()
        except UnicodeDecodeError:
            raise InputError(f"line {self._number + 1} of standard input is not UTF-8 text; convert it") from None

    def _typed(self, prompt: str) -> str | None:
        if not self._edited:
            print(prompt, end="", file=sys.stderr, flush=True)
        try:
            return input(prompt if self._edited else "")
        except EOFError:
            print(file=sys.stderr)
            return None

    def _piped(self) -> str | None:
        line = sys.stdin.buffer.readline()
        if not line:
            return None
        return line.decode("utf-8" if self._number else "utf-8-sig").rstrip("\r\n")
