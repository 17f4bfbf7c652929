"""Runs the tests of Triton kernels on the CPU, in Triton's interpreter."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def interpret() -> Callable[[str], None]:
    """Run the tests of a file beside this one in a child process under the interpreter.

    Triton decides at import whether it interprets, so these tests need a process of
    their own. The child must run at least one test, and all must pass.
    """

    def run(file: str) -> None:
        pytest.importorskip("triton", reason="Triton does not exist for this platform")
        child = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__).parent / file)],
            cwd=ROOT,
            env=os.environ | {"TRITON_INTERPRET": "1"},
            capture_output=True,
            text=True,
            timeout=600,
        )
        report = child.stdout + child.stderr
        assert child.returncode == 0, report
        outcome = child.stdout.strip().splitlines()[-1]
        assert re.search(r"\b[1-9]\d* passed", outcome) and "skipped" not in outcome, report

    return run
