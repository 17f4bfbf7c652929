"""The model that the server's tests serve."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def served_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama's folder with a tokenizer of bytes and a chat template."""
    from serving_case import save_chat_model

    return save_chat_model(tmp_path_factory.mktemp("served"))
