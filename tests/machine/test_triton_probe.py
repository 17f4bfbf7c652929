"""The kernel by which `doctor` tries Triton."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ds_offload.machine.triton_probe import scale, scale_reference

ROOT = Path(__file__).resolve().parents[2]


def test_kernel_in_the_interpreter() -> None:
    pytest.importorskip("triton", reason="Triton does not exist for this platform")
    file = Path(__file__).parent / "interpreted_triton_probe.py"
    child = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert child.returncode == 0 and "12 passed" in child.stdout, child.stdout + child.stderr


def test_reference() -> None:
    assert scale_reference(torch.tensor([1.0, -2.0, 0.5])).tolist() == [2.0, -3.0, 3.0]


@pytest.mark.parametrize("source", [torch.zeros(2, 2), torch.zeros(0), torch.zeros(8)[::2]])
def test_other_shapes_are_refused(source: torch.Tensor) -> None:
    for probe in (scale, scale_reference):
        with pytest.raises(ValueError, match="must be"):
            probe(source)


@pytest.mark.gpu
@pytest.mark.parametrize("length", [1, 3, 1000])
def test_kernel_on_the_device(length: int) -> None:
    source = torch.randn(length, device="cuda")
    torch.testing.assert_close(scale(source), scale_reference(source), rtol=0, atol=0)
