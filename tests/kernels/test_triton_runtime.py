"""A machine without Triton: kernels import, and a launch says what to install."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ds_offload.kernels.triton_runtime import power_of_two

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from ds_offload.kernels import append, gather, label_codec, label_scores
from ds_offload.kernels.triton_runtime import HAS_TRITON, launching
assert not HAS_TRITON
layout = label_codec.LabelLayout(4, 2)
labels = label_codec.encode_labels(torch.ones(1, 3, 4), layout)
query, channels = torch.ones(1, 1, 4), torch.arange(4)[None]
scores = label_scores.label_scores(labels, layout, query, channels, torch.tensor([0]), torch.tensor([3]), 3, 1.0)
# 2-bit labels scale to 0.8 of the largest channel
assert (scores - 3.2).abs().max() < 0.2, scores
try:
    with launching(torch.device("cuda"), "label_scores"):
        raise SystemExit("launched")
except RuntimeError as error:
    print(error)
"""


def test_without_triton_kernels_import_and_a_launch_is_refused() -> None:
    root = Path(__file__).resolve().parents[2]
    child = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], cwd=root, capture_output=True, text=True)
    assert child.returncode == 0, child.stdout + child.stderr
    expected = "label_scores on cuda needs Triton, which is not installed; run: pip install 'triton>=3.6'"
    assert child.stdout.strip() == expected


@pytest.mark.parametrize(("value", "power"), [(0, 1), (1, 1), (2, 2), (3, 4), (64, 64), (65, 128)])
def test_power_of_two(value: int, power: int) -> None:
    assert power_of_two(value) == power


@pytest.mark.gpu
def test_launching_selects_the_device() -> None:
    from ds_offload.kernels.triton_runtime import launching

    device = torch.device("cuda", torch.cuda.device_count() - 1)
    with launching(device, "kernel"):
        assert torch.cuda.current_device() == device.index
