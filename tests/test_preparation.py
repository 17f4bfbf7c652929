"""What a user is told of the choices made before weights load."""

from __future__ import annotations

from pathlib import Path

import pytest
from calibration_case import small_calibration
from tiny_models import save_tiny, tiny_config

from ds_offload.config import OffloadConfig
from ds_offload.preparation import PreparedModel


@pytest.mark.parametrize("given", ["1GiB", None])
def test_gpu_memory_on_a_cpu_is_said_to_limit_nothing(given: str | None, tmp_path: Path) -> None:
    save_tiny(tmp_path, tiny_config("llama"))
    config = OffloadConfig(gpu_memory=given)
    prepared = PreparedModel.find(str(tmp_path), config, "auto", "cpu", "auto", None)
    assert any("gpu_memory limits nothing on the CPU" in line for line in prepared.announcements) == bool(given)


def test_a_tilde_in_the_calibrations_path_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    save_tiny(tmp_path / "model", tiny_config("llama"))
    small_calibration().save(tmp_path / "c.safetensors")
    config = OffloadConfig(calibration="~/c.safetensors")
    prepared = PreparedModel.find(str(tmp_path / "model"), config, "auto", "cpu", "auto", None)
    assert prepared.config.label_code == "product"
