"""Runs tests of Triton kernels in a process of their own: what Triton makes of a kernel is decided at import."""

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
    """Run the tests of a file beside this one on the CPU, in Triton's interpreter."""
    return lambda file: _run(file, os.environ | {"TRITON_INTERPRET": "1"})


@pytest.fixture
def compile_only() -> Callable[[str], None]:
    """Run the tests of a file beside this one, in which Triton compiles; a warning is an error there."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return lambda file: _run(file, environment, "-W", "error")


def _run(file: str, environment: dict[str, str], *options: str) -> None:
    """The child must run at least one test, and all must pass."""
    pytest.importorskip("triton", reason="Triton does not exist for this platform")
    child = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, str(Path(__file__).parent / file)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    report = child.stdout + child.stderr
    assert child.returncode == 0, report
    outcome = child.stdout.strip().splitlines()[-1]
    assert re.search(r"\b[1-9]\d* passed", outcome) and "skipped" not in outcome, report
