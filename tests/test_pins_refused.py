"""A driver that refuses to page-lock the K/V: the same tokens, one warning, and nothing left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import random_prompts, save_tiny, tiny_config

import ds_offload.context_stores
from ds_offload import OffloadConfig, OffloadedGenerator
from ds_offload.machine import host_memory
from ds_offload.memory import host_block, page_locking, staging_ring
from ds_offload.memory.pinned_pool import PinnedPool

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = random_prompts(150, 70)
SEGMENT, NEW = 16, 40
# Which registrations fail, by their number; the prompts take 17 segments, and decoding makes two more.
REFUSED: dict[str, Callable[[int], bool]] = {
    "first": lambda n: True,
    "in the prefill": lambda n: n >= 7,
    "while decoding": lambda n: n >= 18,
}


def make(folder: Path, device: str, **changes: Any) -> OffloadedGenerator:
    config = {"max_context": 1024, "sink_tokens": 2, "recent_tokens": 4, "token_budget": "1/4", "hot_set": 1.5}
    config |= {"segment_tokens": SEGMENT} | changes
    return OffloadedGenerator.from_pretrained(str(folder), config=OffloadConfig(**config), device=device)


def answers(gen: OffloadedGenerator, **options: Any) -> tuple[list[list[int]], dict[str, Any]]:
    outs = gen.generate(PROMPTS, max_new_tokens=NEW, **options)
    return [out.token_ids for out in outs], outs[0].stats


@pytest.fixture
def small_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging_ring.StagingRing.__init__, "__defaults__", ((8192,),))


@pytest.mark.parametrize("changes", [{}, {"prefetch": "exact"}, {"prefetch": "speculative"}, {"dense_layers": (1,)}])
@pytest.mark.parametrize("refused", REFUSED)
def test_staged_answers_on_a_cpu(
    refused: str, changes: dict[str, Any], tmp_path: Path, small_ring: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refusing(PinnedPool):
        given: list[int]

        def begin(
            self, nbytes: int, *, blocks: int = 1, grain: int | None = None, part: int | None = None
        ) -> list[torch.Tensor]:
            made = super().begin(nbytes, blocks=blocks, grain=grain, part=part)
            self.given = [*getattr(self, "given", []), *(block.data_ptr() for block in made)]
            return made

        def left_pageable(self, block: torch.Tensor) -> bool:
            left = REFUSED[refused](self.given.index(block.data_ptr()))
            staged.append(left)
            return left

    staged: list[bool] = []
    save_tiny(tmp_path, tiny_config("llama", 2))
    with make(tmp_path, "cpu", **changes) as gen:
        expected, stats = answers(gen)
        monkeypatch.setattr(ds_offload.context_stores, "PinnedPool", Refusing)
        found, staged_stats = answers(gen)
    assert found == expected
    assert any(staged) and len(staged) == 19
    for name in ("h2d_bytes_per_token", "hot_set_hit_rate", "host_kv_bytes"):
        assert staged_stats[name] == stats[name]


class RefusingDriver:
    """Registers for the real driver until `refuses(number of the registration)`; the ring only where `ring` says."""

    def __init__(self, refuses: Callable[[int], bool], ring: bool) -> None:
        self.refuses, self.ring = refuses, ring
        self.held: dict[int, int] = {}
        self.asked = 0
        self._register, self._unregister = page_locking.lock_pages, page_locking.unlock_pages

    def register(self, device: torch.device, address: int, size: int) -> int:
        if size in staging_ring.RING_BYTES:
            refused = not self.ring
        else:
            refused = self.refuses(self.asked)
            self.asked += 1
        if refused:
            # What the driver leaves pending is cleared by the real call: this memory cannot be registered.
            assert self._register(device, 0, size) != 0
            return 2
        code = self._register(device, address, size)
        if code == 0:
            self.held[address] = size
        return code

    def unregister(self, device: torch.device, address: int) -> None:
        self._unregister(device, address)
        del self.held[address]


@pytest.mark.usefixtures("page_locked")
@pytest.mark.gpu
@pytest.mark.parametrize("ring", [True, False])
@pytest.mark.parametrize("prefetch", ["off", "exact", "speculative"])
@pytest.mark.parametrize("refused", REFUSED)
def test_staged_answers_on_a_gpu(
    refused: str,
    prefetch: str,
    ring: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save_tiny(tmp_path, tiny_config("llama", 2), torch.bfloat16)
    with make(tmp_path, "cuda", prefetch=prefetch) as gen:
        expected, stats = answers(gen)
        before = torch.cuda.memory_allocated()
        gen.kept.release()
        driver = RefusingDriver(REFUSED[refused], ring)
        monkeypatch.setattr(page_locking, "lock_pages", driver.register)
        monkeypatch.setattr(page_locking, "unlock_pages", driver.unregister)
        capsys.readouterr()
        found, staged_stats = answers(gen)
        said = [line for line in capsys.readouterr().err.splitlines() if "refused to page-lock" in line]
        assert found == expected
        gen.kept.release()
        assert driver.held == {} and torch.cuda.memory_allocated() == before
        assert len(said) == 1 and "CUDA error 2" in said[0] and "no CUDA graph" in said[0] and "ulimit -l" in said[0]
        assert (staged_stats["graph_capture_s"] is None) == (refused != "while decoding")
        assert staged_stats["host_kv_bytes"] == stats["host_kv_bytes"]
        ring_bytes = staging_ring.RING_BYTES[0] if ring else 0
        assert ring_bytes <= staged_stats["host_pinned_bytes"] < ring_bytes + stats["host_kv_bytes"]
        # The driver takes everything again: so does the runtime.
        driver.refuses = lambda n: False
        again, stats = answers(gen)
        assert again == expected and stats["host_pinned_bytes"] == stats["host_kv_bytes"]


@pytest.mark.usefixtures("page_locked")
@pytest.mark.gpu
@pytest.mark.parametrize("first", [0, 2, 5, 8, 10, 14])
def test_a_refusal_between_two_layers_of_a_segment(
    first: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows of the layers before were written to memory that is unlocked then."""
    save_tiny(tmp_path, tiny_config("llama", 2), torch.bfloat16)
    # Two pages a layer, each locked by itself: 9 calls for the first prompt, 6 for the second.
    monkeypatch.setattr(host_block, "PART_BYTES", 1)
    with make(tmp_path, "cuda", segment_tokens=64) as gen:
        expected, stats = answers(gen)
        gen.kept.release()
        driver = RefusingDriver(lambda n: n == first, True)
        monkeypatch.setattr(page_locking, "lock_pages", driver.register)
        monkeypatch.setattr(page_locking, "unlock_pages", driver.unregister)
        capsys.readouterr()
        found, staged_stats = answers(gen)
        assert found == expected
        assert staged_stats["host_pinned_bytes"] < stats["host_pinned_bytes"] + staging_ring.RING_BYTES[0]
        assert capsys.readouterr().err.count("refused to page-lock") == 1
    assert driver.held == {}


@pytest.mark.usefixtures("page_locked")
@pytest.mark.gpu
@pytest.mark.parametrize("ring", [True, False])
def test_a_streamed_prefill_reads_pageable_rows_back(
    ring: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config("llama", 2, hidden_size=256, num_attention_heads=8, head_dim=64, max_position_embeddings=65536)
    save_tiny(tmp_path, config, torch.bfloat16)
    prompt = random_prompts(20_000)[0]
    monkeypatch.setattr("ds_offload.memory.plan.prefill_mode", lambda shape, room: "streamed")
    with make(tmp_path, "cuda", max_context=32_768, segment_tokens=1024) as gen:
        expected = gen.generate(prompt, max_new_tokens=16).token_ids
        gen.kept.release()
        driver = RefusingDriver(lambda n: n >= 5, ring)
        monkeypatch.setattr(page_locking, "lock_pages", driver.register)
        monkeypatch.setattr(page_locking, "unlock_pages", driver.unregister)
        assert gen.generate(prompt, max_new_tokens=16).token_ids == expected
    assert driver.asked > 5 and driver.held == {}


CHILD = """
import sys
from ds_offload import OffloadConfig, OffloadedGenerator
config = OffloadConfig(max_context=1024, sink_tokens=2, recent_tokens=4, token_budget="1/4")
with OffloadedGenerator.from_pretrained(sys.argv[1], config=config, device="cuda") as gen:
    print(*gen.generate([int(n) for n in sys.argv[2].split()], max_new_tokens=16).token_ids)
"""


@pytest.mark.gpu
def test_a_memlock_of_64_kib(tmp_path: Path) -> None:
    if host_memory._may_lock(Path("/")):
        pytest.skip("memlock does not hold for this user (CAP_IPC_LOCK)")
    save_tiny(tmp_path, tiny_config("llama", 2))
    ids = PROMPTS[0]
    with make(tmp_path, "cuda", segment_tokens=1024, hot_set=None) as gen:
        expected = gen.generate(ids, max_new_tokens=16).token_ids
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    child = subprocess.run(
        [
            "bash",
            "-c",
            'ulimit -l 64 && exec "$0" -c "$@"',
            sys.executable,
            CHILD,
            str(tmp_path),
            " ".join(map(str, ids)),
        ],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert child.returncode == 0, child.stderr
    assert [int(n) for n in child.stdout.split()] == expected
