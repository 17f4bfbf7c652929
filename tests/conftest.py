"""What all tests share."""

from __future__ import annotations

import os
import random
from pathlib import Path

# Before transformers is imported: no test may reach for a hub.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The default model's folder, downloaded and converted on first use."""
    from ds_offload.default_model import default_model_folder

    return default_model_folder()
