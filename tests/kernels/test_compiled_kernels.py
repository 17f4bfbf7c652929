"""Kernels compile for GPUs that are not there, and fit their shared memory."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


def test_kernels_compiled_for_other_gpus() -> None:
    """In a process of its own, whose Triton believes in a device."""
    pytest.importorskip("triton", reason="Triton does not exist for this platform")
    file = Path(__file__).parent / "compiled_kernels.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    child = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", str(file)],
        cwd=file.parents[2],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    report = child.stdout + child.stderr
    assert child.returncode == 0, report
    outcome = child.stdout.strip().splitlines()[-1]
    assert re.search(r"\b[1-9]\d* passed", outcome) and "skipped" not in outcome, report
