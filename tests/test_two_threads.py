"""Two threads of one process, a generator each."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from generator_case import NEW, make
from tiny_models import random_prompts

import ds_offload.loading


def test_models_load_one_after_the_other(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers is not made for two at once: weights of one would be missing."""
    inside, most = [0], [0]
    load = ds_offload.loading._load_folder
    second = threading.Event()

    def counted(*arguments: Any) -> Any:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        second.wait(0.2)  # a second one would come in meanwhile
        try:
            return load(*arguments)
        finally:
            inside[0] -= 1

    monkeypatch.setattr(ds_offload.loading, "_load_folder", counted)
    prompts = random_prompts(150, 90)
    with make(tiny_llama) as generator:
        alone = [generator.generate(prompt, max_new_tokens=NEW).token_ids for prompt in prompts]

    def answer(prompt: list[int]) -> list[int]:
        with make(tiny_llama) as generator:
            return list(generator.generate(prompt, max_new_tokens=NEW).token_ids)

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(answer, prompts)) == alone
    assert most == [1]
