"""Published figures: every GPU that a plan may name, and links that stay below what PCIe allows."""

from __future__ import annotations

import pytest

from ds_offload.machine.published import PUBLISHED


def test_every_gpu_that_a_plan_may_name() -> None:
    assert set(PUBLISHED) == {"h200", "h100", "a100", "l40s", "rtx5090", "rtx4090", "rtx3090", "l4", "a10g"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_figures_are_within_what_is_possible(name: str) -> None:
    gpu = PUBLISHED[name]
    raw = {4: 31.5, 5: 63.0}[gpu.pcie_generation]
    assert gpu.pcie_width == 16 and 0.8 * raw < gpu.link_gb_per_s < 0.9 * raw
    assert 24e9 <= gpu.memory_bytes <= 141e9 and 300 <= gpu.memory_gb_per_s <= 4800
    assert 50 < gpu.bf16_tflops < 1000


def test_the_link_of_the_h100_is_near_the_measured_one() -> None:
    assert PUBLISHED["h100"].link_gb_per_s == pytest.approx(53.8, rel=0.01)
