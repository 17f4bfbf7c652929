"""Prefills in processes of their own, killed and interrupted."""

from __future__ import annotations

import functools
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
from tiny_models import random_prompts, save_tiny, tiny_config

from ds_offload import OffloadConfig, OffloadedGenerator
from ds_offload.prefill_checkpoint import PrefillCheckpoint

LENGTH, LAYERS, NEW = 90, 5, 8
IDS = random_prompts(LENGTH)[0]


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DS_OFFLOAD_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_tiny(folder, tiny_config("llama", num_hidden_layers=LAYERS))
    return folder


def make(model: Path, device: str = "cpu", **changes: Any) -> OffloadedGenerator:
    config = {"max_context": 512, "sink_tokens": 2, "recent_tokens": 4, "token_budget": 16, "segment_tokens": 16}
    return OffloadedGenerator.from_pretrained(str(model), config=OffloadConfig(**config | changes), device=device)


CHILD = """
import os, signal, sys
import ds_offload.prefill_checkpoint
import ds_offload.tensor_file
from ds_offload import OffloadConfig, OffloadedGenerator
ds_offload.prefill_checkpoint.EVERY_S = 0.0
model, folder, at, ids = sys.argv[1], sys.argv[2], sys.argv[3], [int(n) for n in sys.argv[4].split()]

def write(file, part):
    file.write(part[:len(part) // 2] if at in file.name else part)
    file.flush()
    if at in file.name:
        os.kill(os.getpid(), signal.SIGKILL)

ds_offload.tensor_file._write = write

config = OffloadConfig(max_context=512, sink_tokens=2, recent_tokens=4, token_budget=16, segment_tokens=16)
with OffloadedGenerator.from_pretrained(model, config=config, device="cpu") as gen:
    gen.generate(ids, max_new_tokens=8, checkpoint=folder)
"""


def run_child(code: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    # A shell starts what it puts into the background deaf to Ctrl-C, and children inherit that.
    hears = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=hears)


@pytest.mark.parametrize(("at", "layers"), [("layer-0000", 0), ("layer-0003", 3), ("hidden-0004", 3)])
def test_a_killed_process_is_gone_on_with_by_the_next(at: str, layers: int, model: Path, tmp_path: Path) -> None:
    """It was killed while it wrote a file; the next one writes none, and leaves none behind."""
    folder = tmp_path / "kept"
    child = run_child(CHILD, str(model), str(folder), at, " ".join(map(str, IDS)))
    child.communicate(timeout=120)
    assert child.returncode == -signal.SIGKILL
    assert (folder / f".{at}.safetensors.tmp").exists()
    assert (folder / "layer-0003.safetensors").exists() == (at == "hidden-0004")
    with make(model) as gen:
        expected = gen.generate(IDS, max_new_tokens=NEW).token_ids
        started: list[int] = []
        out = gen.generate(
            IDS, max_new_tokens=NEW, checkpoint=folder, on_progress=lambda _, done, __: started.append(done)
        )
    if layers:
        assert started[0] == LENGTH * layers // LAYERS
    assert out.token_ids == expected
    assert list(folder.iterdir()) == []


def test_what_was_killed_in_its_first_write_has_kept_nothing_and_stands_in_no_ones_way(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "kept"
    child = run_child(CHILD, str(model), str(folder), "layer-0000", " ".join(map(str, IDS)))
    child.communicate(timeout=120)
    assert child.returncode == -signal.SIGKILL and (folder / "prefill.json").exists()
    monkeypatch.setattr("ds_offload.prefill_checkpoint.EVERY_S", 0.0)
    saved: list[int] = []
    save = PrefillCheckpoint.save

    def saving(self: PrefillCheckpoint, *given: Any) -> None:
        saved.append(given[-1])
        save(self, *given)

    monkeypatch.setattr(PrefillCheckpoint, "save", saving)
    with make(model) as gen:
        gen.generate(IDS[::-1], max_new_tokens=NEW, checkpoint=folder)
    # Behind the last layer nothing is left to go on with.
    assert saved == list(range(1, LAYERS))
    assert list(folder.iterdir()) == []


INTERRUPTED = """
import sys, time
import ds_offload.prefill
from ds_offload.cli.main import main
from ds_offload.prefill_pace import Pace

def slow(pace, tokens):
    time.sleep(0.2)
    print("chunk", file=sys.stderr, flush=True)

Pace.projected = slow
ds_offload.prefill.chunk_tokens = lambda *sizes: 1
sys.exit(main(["run", "--device", "cpu", "--max-new-tokens", "4", *sys.argv[1:]]))
"""


def test_ctrl_c_ends_a_prefill_within_a_second(model: Path) -> None:
    child = run_child(INTERRUPTED, "--model", str(model), "--prompt", " ".join(map(str, IDS)))
    assert child.stderr is not None
    while (line := child.stderr.readline()) != "chunk\n":
        assert line, "the child ended by itself"
    child.send_signal(signal.SIGINT)
    sent = time.monotonic()
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert err.splitlines()[-1] == "ds-offload: interrupted"
    # One second for the prefill; the rest is for a busy machine to end the interpreter.
    assert time.monotonic() - sent < 3


@pytest.mark.gpu
def test_ctrl_c_on_a_gpu(tmp_path: Path) -> None:
    """The queue holds a part of a second, whatever the prompt."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8, "num_hidden_layers": 16}
    tiny_config("llama", 2, head_dim=128, max_position_embeddings=1 << 19, **sizes).save_pretrained(tmp_path)
    prompt = tmp_path / "prompt.txt"
    prompt.write_text(" ".join(map(str, random_prompts(130_000)[0])))
    code = INTERRUPTED.replace("time.sleep(0.2)", "projected(pace, tokens)").replace('"cpu"', '"cuda"')
    code = code.replace("ds_offload.prefill.chunk_tokens = lambda *sizes: 1\n", "")
    code = code.replace("def slow", "projected = Pace.projected\n\ndef slow")
    child = run_child(
        code, "--model", str(tmp_path), "--load-format", "dummy", "--dtype", "bf16", "--prompt-file", str(prompt)
    )
    assert child.stderr is not None
    said: list[str] = []
    while said.count("chunk\n") < 20:
        said.append(child.stderr.readline())
        assert said[-1], said
    child.send_signal(signal.SIGINT)
    sent = time.monotonic()
    while (line := child.stderr.readline()) != "ds-offload: interrupted\n":
        assert line in ("chunk\n",), line
    # Some GiB of page-locked memory have been given back by then.
    assert time.monotonic() - sent < 3
    assert child.wait(60) == 130
