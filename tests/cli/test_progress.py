"""Progress on a terminal and elsewhere."""

from __future__ import annotations

import io
import sys

import pytest

from ds_offload.cli import progress
from ds_offload.cli.progress import ProgressReport, describe


class Clock:
    """A clock that the test moves."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_lines_no_more_often_than_asked(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressReport(every_s=5) as report:
        for layer in range(1, 31):
            report("prefill", layer, 30)
            clock.now += 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5
    assert lines[0] == "ds-offload: prefill 6/30 layers (20 %), 1 layers/s, 24 s left"


def test_quick_work_says_nothing(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressReport() as report:
        for phase in ("calibrate", "prefill", "decode"):
            for done in range(1, 5):
                clock.now += 0.5
                report(phase, done, 4)
    captured = capsys.readouterr()
    assert captured.err == captured.out == ""


def test_every_phase_and_every_sequence_has_its_own_rate(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressReport(every_s=5) as report:
        for seconds in (10, 20):  # two prompts, the second twice as slow
            for layer in (1, 2):
                report("prefill", layer, 4)
                clock.now += seconds
        report("decode", 1, 100)
        clock.now += 10
        report("decode", 21, 100)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("ds-offload: ")[1] for line in lines] == [
        "prefill 2/4 layers (50 %), 0.1 layers/s, 20 s left",
        "prefill 2/4 layers (50 %), 0.05 layers/s, 40 s left",
        "decode 21/100 tokens (21 %), 2 tokens/s, 40 s left",
    ]


def test_other_phases_are_passed_over(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressReport(phases=("prefill",), every_s=1) as report:
        report("prefill", 1, 2)
        clock.now += 1
        report("decode", 1, 2)
        clock.now += 1
        report("decode", 2, 2)
    assert capsys.readouterr().err == ""


def test_no_rate_yet() -> None:
    assert describe("decode", 0, 0, 0.0) == "decode 0/0 tokens (0 %)"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_on_a_terminal(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    with ProgressReport() as report:
        report("prefill", 1, 3)
        clock.now += 1
        report("prefill", 2, 3)
        report.close()
        before = terminal.getvalue()
        report("prefill", 3, 3)
    assert "prefill" in before and "layers" in before and "1/s" in before
    assert "ds-offload:" not in before
    assert before.endswith("\x1b[2K"), "the bar must be wiped off, so that the answer has the line"
