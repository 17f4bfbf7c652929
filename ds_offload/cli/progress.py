"""How far the work is, on stderr: a bar on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

from ds_offload.notices import notice

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

UNITS = {"prefill": "tokens", "decode": "tokens", "calibrate": "steps"}
LINE_EVERY_S = 5.0


class ProgressReport:
    """Shows phase, done of total, rate and time left; call it as `on_progress(phase, done, total)`.

    On a terminal a bar that disappears when the phase ends. Elsewhere a plain line at most
    every `every_s` seconds, so that short work says nothing. A context manager; `close` may
    be called earlier, before the answer is printed to the same terminal.

    Args:
        phases: Phases to show; others are passed over.
        every_s: Seconds between two plain lines.
    """

    def __init__(self, phases: tuple[str, ...] = tuple(UNITS), every_s: float = LINE_EVERY_S) -> None:
        self._phases = phases
        self._every_s = every_s
        self._phase = ""
        self._started = self._said = 0.0
        self._first = self._done = 0
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._terminal = sys.stderr is not None and sys.stderr.isatty()

    def __enter__(self) -> ProgressReport:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar off the terminal."""
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._task = None

    def __call__(self, phase: str, done: int, total: int) -> None:
        if phase not in self._phases:
            self.close()
            return
        now = time.monotonic()
        if phase != self._phase or done < self._done:
            # A phase, or the same for the next sequence, begins. Its rate counts from this first report
            # on: when the work itself began is not known here.
            self.close()
            self._phase, self._started, self._said, self._first = phase, now, now, done
            if self._terminal:
                self._open_bar(phase, done, total)
        self._done = done
        rate = (done - self._first) / (now - self._started) if now > self._started else 0.0
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, total=total, rate=f"{rate_text(rate)}/s" if rate else "")
            if done >= total:
                self.close()
        elif not self._terminal and now - self._said >= self._every_s:
            self._said = now
            notice(describe(phase, done, total, rate))

    def _open_bar(self, phase: str, done: int, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:,}/{task.total:,}"),
            TextColumn(UNITS[phase]),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._bar.add_task(phase, completed=done, total=total, rate="")
        self._bar.start()


def describe(phase: str, done: int, total: int, rate: float) -> str:
    """One line: "prefill 52,428/131,072 tokens (40 %), 8,140 tokens/s, 9 s left"."""
    unit = UNITS[phase]
    line = f"{phase} {done:,}/{total:,} {unit} ({100 * done // max(total, 1)} %)"
    if rate > 0:
        line += f", {rate_text(rate)} {unit}/s, {duration_text((total - done) / rate)} left"
    return line


def rate_text(rate: float) -> str:
    """A rate in three digits: 0.123, 1.23, 123 or 12,300."""
    return f"{rate:.3g}" if rate < 1000 else f"{float(f'{rate:.3g}'):,.0f}"


def duration_text(seconds: float) -> str:
    """A time to come: "9 s", "3 min 20 s", "1 h 4 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
