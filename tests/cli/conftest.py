"""Two tiny random models in folders, and `ds-offload` run in this process."""

from __future__ import annotations

import io
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
LAYERS, HEAD_DIM, CONTEXT, VOCAB = 3, 32, 512, 300


def save_model(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=HEAD_DIM,
        max_position_embeddings=CONTEXT,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def byte_tokenizer(chat_template: str | None) -> PreTrainedTokenizerFast:
    """One token a byte; ids from 256 on are unknown to it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=chat_template)


@pytest.fixture(scope="session")
def ids_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model's folder without a tokenizer."""
    return str(save_model(tmp_path_factory.mktemp("models") / "ids-only", seed=1))


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model's folder with a byte tokenizer and a chat template."""
    folder = save_model(tmp_path_factory.mktemp("models") / "chat", seed=2)
    byte_tokenizer(TEMPLATE).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def plain_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model's folder with a byte tokenizer and no chat template."""
    folder = save_model(tmp_path_factory.mktemp("models") / "plain", seed=3)
    byte_tokenizer(None).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def session_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def folders(session_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The cache folder and the temporary folder that commands use."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("DS_OFFLOAD_CACHE", str(session_cache))
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return [session_cache, temporary]


@dataclass
class Ended:
    """What a command left: its status and its output."""

    status: int
    out: str
    err: str

    @property
    def error_lines(self) -> list[str]:
        return self.err.splitlines()


class Pipe(io.TextIOWrapper):
    """Standard input that is a pipe, or a terminal where nobody types."""

    def __init__(self, data: bytes, terminal: bool = False) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


Command = Callable[..., Ended]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs `ds-offload ARGUMENTS` in this process; `stdin` is bytes of a pipe, None a terminal, and `typed` there."""
    from ds_offload.cli.main import main

    def run(*arguments: str, stdin: bytes | None = None, typed: bytes = b"") -> Ended:
        monkeypatch.setattr(sys, "stdin", Pipe(typed if stdin is None else stdin, terminal=stdin is None))
        capsys.readouterr()
        status = main(list(arguments))
        captured = capsys.readouterr()
        return Ended(status, captured.out, captured.err)

    return run


def tree(folders: list[Path]) -> set[str]:
    return {os.path.join(root, name) for folder in folders for root, _, files in os.walk(folder) for name in files}


@pytest.fixture
def refused(command: Command, folders: list[Path]) -> Command:
    """Runs a command that must end in one line on stderr, status 2, nothing on stdout and nothing left behind.

    Returns what it left, its `err` being that one line.
    """

    def run(*arguments: str, stdin: bytes | None = None) -> Ended:
        before = tree(folders)
        ended = command(*arguments, stdin=stdin)
        assert ended.status == 2, ended
        assert ended.out == ""
        assert len(ended.error_lines) == 1, ended.err
        assert ended.err.startswith("ds-offload: error: ")
        assert tree(folders) == before
        return ended

    return run
