"""Ctrl-C while an answer comes: noted, and acted on between two steps."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any


class AnswerInterrupt:
    """Notes the first Ctrl-C, for `check` to raise; a further one raises wherever the work is.

    A context manager, for the main thread; behind it Ctrl-C does what it did before. Where Ctrl-C is
    ignored, or not `wanted`, nothing is changed.
    """

    def __init__(self, wanted: bool) -> None:
        self._asked = False
        self._before: Any = signal.getsignal(signal.SIGINT) if wanted else None

    def __enter__(self) -> AnswerInterrupt:
        if callable(self._before):
            signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        if callable(self._before):
            signal.signal(signal.SIGINT, self._before)

    def check(self) -> None:
        """Raise KeyboardInterrupt if Ctrl-C came."""
        if self._asked:
            raise KeyboardInterrupt

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.check()
        self._asked = True
