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


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama's folder, which no test changes."""
    from tiny_models import save_tiny, tiny_config

    folder = tmp_path_factory.mktemp("tiny_llama")
    save_tiny(folder, tiny_config("llama"))
    return folder


@pytest.fixture(scope="session")
def _saved_session(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from session_case import DOCUMENT, make

    folder = tmp_path_factory.mktemp("sessions") / "original"
    with make(tiny_llama) as gen, gen.prefill(DOCUMENT) as session:
        session.save(folder)
    return folder


@pytest.fixture
def saved_session(_saved_session: Path, tmp_path: Path) -> Path:
    """A saved session of the tiny Llama, in a folder "book" of its own, which a test may damage."""
    folder = tmp_path / "book"
    folder.mkdir()
    for file in _saved_session.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder
