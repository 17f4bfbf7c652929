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


@pytest.fixture(autouse=True)
def _managed_memory_of_any_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small stores of the tests lie where a user's large ones do."""
    if request.node.get_closest_marker("gpu"):
        from ds_offload.memory import managed_memory

        monkeypatch.setattr(managed_memory, "LARGE_PAGE", 1)


@pytest.fixture
def page_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    """No managed memory, as on WSL: the store is page-locked."""
    from ds_offload.memory import managed_memory

    monkeypatch.setattr(managed_memory, "supported", lambda device: False)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The default model's folder, downloaded and converted on first use."""
    from ds_offload.default_model import default_model_folder

    return default_model_folder()
