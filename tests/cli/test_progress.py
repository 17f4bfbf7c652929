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
        for done in range(1000, 31_000, 1000):
            report("prefill", done, 30_000)
            clock.now += 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5
    assert lines[0] == "ds-offload: prefill 6,000/30,000 tokens (20 %), 1,000 tokens/s, 24 s left"


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
        "prefill 2/4 tokens (50 %), 0.1 tokens/s, 20 s left",
        "prefill 2/4 tokens (50 %), 0.05 tokens/s, 40 s left",
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


@pytest.mark.parametrize(
    ("rate", "text"),
    [
        (1.0, "1 tokens/s, 1 h 6 min left"),
        (8.333, "8.33 tokens/s, 8 min 0 s left"),
        (999.4, "999 tokens/s, 4 s left"),
        (12_345.0, "12,300 tokens/s, 0 s left"),
    ],
)
def test_rates_and_times_are_readable(rate: float, text: str) -> None:
    assert describe("prefill", 1000, 5000, rate) == f"prefill 1,000/5,000 tokens (20 %), {text}"


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
        report("prefill", 0, 131_072)
        clock.now += 1
        report("prefill", 8192, 131_072)
        report.close()
        before = terminal.getvalue()
        report("prefill", 131_072, 131_072)
    assert "prefill" in before and "8,192/131,072" in before and "tokens" in before and "8,190/s" in before
    assert "ds-offload:" not in before
    assert before.endswith("\x1b[2K"), "the bar must be wiped off, so that the answer has the line"
