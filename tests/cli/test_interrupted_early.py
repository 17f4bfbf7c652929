"""Ctrl-C while a command is still importing what it needs: one line and status 130, whatever swallows the exception."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

WAITS = """
import sys, time
print("importing", flush=True)
while True:
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        print("swallowed", flush=True)
"""


@pytest.mark.parametrize("slow", ["typer", "numpy", "torch"])
def test_an_import_that_swallows_it(slow: str, tmp_path: Path) -> None:
    (tmp_path / f"{slow}.py").write_text(WAITS, encoding="utf-8")
    with subprocess.Popen(
        [sys.executable, "-m", "ds_offload", "run", "--model", "smollm2-135m", "--prompt", "Hi"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "importing\n"
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=30)
    assert (child.returncode, out, err) == (130, "", "ds-offload: interrupted\n")


def test_one_that_is_ignored_stays_ignored() -> None:
    """As a shell starts what it runs in the background."""
    script = (
        "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "from ds_offload.__main__ import main\n"
        "main(['--version']); print(signal.getsignal(signal.SIGINT) is signal.SIG_IGN)"
    )
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout.endswith("True\n")
