"""A tiny random model with a tokenizer of bytes, ready to be evaluated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save_tiny, tiny_config
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ds_offload import OffloadConfig
from ds_offload.evaluation.subject import EvalSubject, prepare

CONTEXT = 256


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny(folder, tiny_config("llama", vocab_size=300, max_position_embeddings=4096, initializer_range=0.3))
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_OFFLOAD_CACHE", str(cache))


MakeSubject = Callable[..., EvalSubject]


@pytest.fixture
def subject_of(tiny_folder: Path) -> Iterator[MakeSubject]:
    """Makes a subject of the tiny model with the config's fields that are given."""
    made = []

    def make(device: str = "cpu", **changes: Any) -> EvalSubject:
        fields = {"max_context": CONTEXT, "token_budget": "1/8", "sink_tokens": 2, "recent_tokens": 4} | changes
        model = {"name": str(tiny_folder), "load_format": "auto", "device": device, "dtype": "auto"}
        made.append(EvalSubject(prepare(model | {"rope_scaling": None}, OffloadConfig(**fields))))
        return made[-1]

    yield make
    for subject in made:
        subject.close()


@pytest.fixture
def text() -> str:
    """Random letters: 600 tokens."""
    generator = torch.Generator().manual_seed(3)
    return "".join(chr(97 + n) for n in torch.randint(0, 26, (600,), generator=generator).tolist())
