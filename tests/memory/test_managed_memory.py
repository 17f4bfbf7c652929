"""Managed memory: kernels and copies reach the same bytes, and tokens are those of a page-locked store."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import random_prompts, save_tiny, tiny_config

from ds_offload import OffloadConfig, OffloadedGenerator
from ds_offload.memory import managed_memory, page_locking
from ds_offload.memory.host_block import BlockLayout, HostBlock
from ds_offload.memory.kept_blocks import KeptBlocks
from ds_offload.memory.kv_store import KVStore
from ds_offload.memory.pinned_pool import PinnedPool

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
MIB = 1 << 20
SEGMENT, HEADS, DIM = 64, 3, 32


def test_a_cpu_has_none() -> None:
    assert not managed_memory.supported(CPU)
    assert managed_memory.allocate(CPU, 64 * MIB) is None
    with PinnedPool(CPU, in_place=True) as pool:
        block = pool.allocate(4 * MIB)
        assert managed_memory.on_device(block) is None and not block.any()


class FakeCuda:
    """Runtime and driver libraries whose calls return what they are told to."""

    def __init__(self, concurrent: int = 1, malloc: int = 0, advise: int = 0) -> None:
        self.concurrent, self.malloc, self.advise = concurrent, malloc, advise
        self.freed: list[int] = []
        self.cleared = 0

    def cudaDeviceGetAttribute(self, value: Any, attribute: int, device: int) -> int:
        assert (attribute, device) == (89, 0)
        value._obj.value = self.concurrent
        return 0

    def cudaMallocManaged(self, pointer: Any, size: ctypes.c_size_t, flags: int) -> int:
        pointer._obj.value = 0x10000
        return self.malloc

    def cudaFree(self, pointer: ctypes.c_void_p) -> int:
        self.freed.append(pointer.value or 0)
        return 0

    def cuMemAdvise_v2(self, address: Any, size: Any, advice: int, location: Any) -> int:
        return self.advise

    def cudaGetLastError(self) -> int:
        self.cleared += 1
        return 0


@pytest.mark.parametrize(
    ("fake", "freed", "cleared", "reason"),
    [
        (FakeCuda(concurrent=0), [], 0, "cannot use managed memory at once"),
        (FakeCuda(malloc=2), [], 1, "refused managed memory"),
        (FakeCuda(advise=1), [0x10000], 0, "refused to keep managed memory on the host"),
    ],
)
def test_a_refusal_leaves_an_ordinary_mapping_and_says_so_once(
    fake: FakeCuda,
    freed: list[int],
    cleared: int,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(page_locking, "cuda_runtime", lambda: fake)
    monkeypatch.setattr(managed_memory, "_driver", lambda: fake)
    monkeypatch.setattr(managed_memory, "supported", managed_memory.supported.__wrapped__)
    monkeypatch.setattr(managed_memory, "wanted_node", lambda device: None)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "device", _NoDevice)
    managed_memory._say_locked.cache_clear()
    for _ in range(2):
        block = HostBlock.map(BlockLayout(4 * MIB, in_place=True), CUDA)
        assert not block.managed and not block.tensor().any()
        block.release()
    assert (fake.freed, fake.cleared) == (2 * freed, 2 * cleared)
    said = capsys.readouterr().err
    assert said.count("page-locked") == 1 and reason in said
    managed_memory._say_locked.cache_clear()


class _NoDevice:
    def __init__(self, device: torch.device) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass


def test_what_is_small_is_page_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(managed_memory, "supported", lambda device: pytest.fail("was asked"))
    assert managed_memory.allocate(CUDA, managed_memory.LARGE_PAGE - 1) is None


def test_blocks_of_either_kind_are_kept_apart() -> None:
    kept = KeptBlocks()
    kept.put(HostBlock.map(BlockLayout(MIB), CPU))
    assert kept.take(BlockLayout(MIB, in_place=True), 1) == []


@pytest.mark.gpu
def test_host_and_device_reach_the_same_bytes() -> None:
    with PinnedPool(CUDA, in_place=True) as pool:
        block = pool.allocate(5 * MIB + 4096)
        view = managed_memory.on_device(block)
        assert view is not None and view.is_cuda and view.data_ptr() == block.data_ptr() and len(view) == len(block)
        assert pool.pinned_bytes == pool.nbytes >= 5 * MIB
        assert not view.any() and not block.any()
        block.copy_(torch.arange(len(block)).to(torch.uint8))
        assert int(view.long().sum()) == int(block.long().sum()) > 0
        view.fill_(7)
        torch.cuda.synchronize()
        assert bool((block == 7).all())
        address = block.data_ptr()
    assert pool.nbytes == 0 and address not in managed_memory._on_device


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8])
def test_a_store_gives_back_what_was_written(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 100, (2, HEADS, 5 * SEGMENT + 7, 2, DIM), generator=generator).to(dtype).to(CUDA)
    with PinnedPool(CUDA, in_place=True) as pool:
        store = KVStore(
            layers=[0, 2], sequences=1, kv_heads=HEADS, head_dim=DIM, dtype=dtype, device=CUDA, pool=pool,
            segment_tokens=SEGMENT, max_tokens=1000,
        )  # fmt: skip
        length = rows.shape[2] - 1
        store.reserve(0, length + 1)
        for number, layer in enumerate((0, 2)):
            store.write_prompt(layer, 0, 0, rows[number, :, :50])
            store.write_prompt(layer, 0, 50, rows[number, :, 50:length])
            store.append(layer, torch.tensor([length], device=CUDA), rows[number, None, :, -1])
        out = torch.zeros_like(rows[0])
        for number, layer in enumerate((0, 2)):
            store.read(layer, 0, 0, out)
            assert torch.equal(out, rows[number])
            tokens = torch.arange(length + 1, device=CUDA).expand(1, HEADS, -1).contiguous()
            gathered = torch.zeros_like(out)[None]
            store.gather(layer, tokens, tokens, gathered)
            assert torch.equal(gathered[0], rows[number])
            torch.cuda.synchronize()
            kept = torch.cat(list(store.parts(layer, 0, 0, length + 1)))
            assert torch.equal(kept.view(rows[0].shape[0], -1, 2, DIM), rows[number].cpu())
        store.close()


@pytest.mark.gpu
@pytest.mark.parametrize(
    "changes", [{}, {"prefetch": "exact"}, {"prefetch": "speculative"}, {"kv_dtype": "int8"}, {"kv_dtype": "int4"}]
)
def test_tokens_are_those_of_a_page_locked_store(
    changes: dict[str, Any], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    save_tiny(tmp_path, tiny_config("llama", 2), torch.bfloat16)
    prompts = random_prompts(300, 170)
    config = OffloadConfig(
        max_context=1024, sink_tokens=2, recent_tokens=4, token_budget="1/4", hot_set=1.5, segment_tokens=64, **changes
    )

    def answers() -> list[list[int]]:
        with OffloadedGenerator.from_pretrained(str(tmp_path), config=config, device="cuda") as gen:
            before = len(managed_memory._on_device)
            outs = gen.generate(prompts, max_new_tokens=64)
            assert outs[0].stats["host_pinned_bytes"] == outs[0].stats["host_kv_bytes"] > 0
            with gen.prefill(prompts[0]) as session:
                fork = session.fork()
                asked = [one.ask(prompts[1][:9], max_new_tokens=8).token_ids for one in (session, fork, session)]
            used.append(len(managed_memory._on_device) - before)
        return [out.token_ids for out in outs] + asked

    used: list[int] = []
    found = answers()
    assert used[0] > 0
    request.getfixturevalue("page_locked")
    assert answers() == found
    assert used[1] == 0
