"""Kernels compile for GPUs that are not there, fit their shared memory, and wait where they should."""

from __future__ import annotations

from collections.abc import Callable


def test_kernels_compiled_for_other_gpus(compile_only: Callable[[str], None]) -> None:
    compile_only("compiled_kernels.py")
