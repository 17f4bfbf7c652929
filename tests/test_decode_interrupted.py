"""Ctrl-C while decoding: it ends soon, says so, and nothing of the K/V is left."""

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
import torch
from tiny_models import random_prompts

import ds_offload.context_stores
from ds_offload import OffloadConfig, OffloadedGenerator
from ds_offload.memory.pinned_pool import PinnedPool

IDS = random_prompts(60)[0]

INTERRUPTED = """
import sys, time
from ds_offload.cli.main import main
from ds_offload.decode import DecodeLoop

step = DecodeLoop.step

def slow(loop, tokens, lengths):
    print("step", file=sys.stderr, flush=True)
    time.sleep(0.2)
    return step(loop, tokens, lengths)

DecodeLoop.step = slow
sys.exit(main(["run", "--max-new-tokens", "400", *sys.argv[1:]]))
"""

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
def test_a_command_ends_within_a_second(device: str, tiny_llama: Path) -> None:
    arguments = ["--device", device, "--model", str(tiny_llama), "--prompt", " ".join(map(str, IDS))]
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(INTERRUPTED), *arguments],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A shell starts what it puts into the background deaf to it, and children inherit that.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    assert child.stderr is not None
    for _ in range(3):
        while (line := child.stderr.readline()) != "step\n":
            assert line, "the child ended by itself"
    child.send_signal(signal.SIGINT)
    sent = time.monotonic()
    while (line := child.stderr.readline()) != "ds-offload: interrupted\n":
        assert line, "the child ended without a word"
    # One second for the decoding; the rest is for a busy machine.
    assert time.monotonic() - sent < 3
    assert child.wait(60) == 130
    assert child.stderr.read() == ""


@pytest.mark.parametrize("device", DEVICES)
def test_memory_goes_back_and_the_next_call_answers(
    device: str, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pools: list[PinnedPool] = []

    class Kept(PinnedPool):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            pools.append(self)

    def interrupt(phase: str, done: int, total: int) -> None:
        if phase == "decode" and done == 5:
            assert pools[-1].nbytes > 0 and (pools[-1].pinned_bytes > 0) == (device == "cuda")
            raise KeyboardInterrupt

    monkeypatch.setattr(ds_offload.context_stores, "PinnedPool", Kept)
    config = OffloadConfig(max_context=512, sink_tokens=2, recent_tokens=4, token_budget=16, segment_tokens=16)
    with OffloadedGenerator.from_pretrained(str(tiny_llama), config=config, device=device) as gen:
        expected = gen.generate(IDS, max_new_tokens=12).token_ids
        before = torch.cuda.memory_allocated() if device == "cuda" else 0
        with pytest.raises(KeyboardInterrupt):
            gen.generate(IDS, max_new_tokens=12, on_progress=interrupt)
        assert len(pools) == 2 and pools[-1].nbytes == pools[-1].pinned_bytes == 0
        assert gen.generate(IDS, max_new_tokens=12).token_ids == expected
        assert (torch.cuda.memory_allocated() if device == "cuda" else 0) == before
