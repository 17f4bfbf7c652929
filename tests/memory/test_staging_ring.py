"""The ring: bytes arrive whole and in order, whatever their sizes, and its memory goes back."""

from __future__ import annotations

import pytest
import torch

from ds_offload.memory import page_locking, pinned_pool
from ds_offload.memory.host_block import PAGE
from ds_offload.memory.staging_ring import StagingRing

CPU = torch.device("cpu")
DEVICES = [CPU, pytest.param(torch.device("cuda", 0), marks=pytest.mark.gpu)]


def numbers(size: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 256, (size,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sizes", [[1], [64], [65], [1000], [3, 61, 1, 128, 0, 7], [63] * 9, []])
def test_bytes_pass_both_ways(sizes: list[int], device: torch.device) -> None:
    ring = StagingRing(device, sizes=(128,))
    assert ring.buffer_bytes == 64
    sources = [numbers(size, n) for n, size in enumerate(sizes)]
    there = [torch.zeros_like(source, device=device) for source in sources]
    back = [torch.zeros_like(source) for source in sources]
    ring.to_device(zip(sources, there, strict=True))
    ring.to_host(zip(there, back, strict=True))
    for source, copy in zip(sources, back, strict=True):
        assert torch.equal(source, copy)
    ring.close()


@pytest.mark.parametrize("device", DEVICES)
def test_tensors_of_any_dtype_pass_as_bytes(device: torch.device) -> None:
    ring = StagingRing(device, sizes=(100,))
    for dtype in (torch.bfloat16, torch.float32, torch.uint8, torch.int64):
        source = torch.arange(210).view(7, 2, 15).to(dtype)
        there = torch.zeros(7, 2, 15, dtype=dtype, device=device)
        ring.to_device([(source, there)])
        assert torch.equal(there.cpu(), source)
    ring.close()


def test_a_tensor_that_is_not_contiguous_is_refused() -> None:
    with pytest.raises(RuntimeError, match="view"):
        StagingRing(CPU).to_host([(torch.zeros(4, 2), torch.zeros(2, 4).T)])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [0, 1, 4, 5, 23])
def test_rows_that_the_cpu_makes(rows: int, device: torch.device) -> None:
    ring = StagingRing(device, sizes=(96,))

    def make(first: int, part: torch.Tensor) -> None:
        part.copy_((torch.arange(first, first + len(part))[:, None] + torch.arange(12)).to(torch.uint8))

    firsts, parts = [], []
    for first, part in ring.fill(rows, 12, make):
        firsts.append(first)
        parts.append(part.clone())
    assert firsts == list(range(0, rows, 4))
    got = torch.cat([torch.empty(0, 12, dtype=torch.uint8), *(part.cpu() for part in parts)])
    assert torch.equal(got, (torch.arange(rows)[:, None] + torch.arange(12)).to(torch.uint8))
    with pytest.raises(ValueError, match="row of 49 bytes does not fit a staging buffer of 48"):
        next(ring.fill(1, 49, make))
    ring.close()


def test_a_smaller_ring_where_a_large_one_is_refused_and_a_pageable_one_at_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    page = PAGE
    locked: dict[int, int] = {}
    most = 2 * page

    def register(device: torch.device, address: int, size: int) -> int:
        if size > most:
            return 2
        locked[address] = size
        return 0

    monkeypatch.setattr(page_locking, "lock_pages", register)
    monkeypatch.setattr(page_locking, "unlock_pages", lambda device, address: locked.pop(address))
    monkeypatch.setattr(page_locking, "synchronize", lambda device: None)
    monkeypatch.setattr(pinned_pool, "place_near", lambda device, address, size: None)
    sizes = (8 * page, 4 * page, 2 * page)
    ring = StagingRing(torch.device("cuda", 0), sizes)
    assert ring.buffer_bytes == page and ring.pinned_bytes == 2 * page == sum(locked.values())
    ring.close()
    assert locked == {}
    most = page
    ring = StagingRing(torch.device("cuda", 0), sizes)
    assert ring.buffer_bytes == page and ring.pinned_bytes == 0
    ring.close()


@pytest.mark.gpu
def test_a_buffer_is_not_filled_while_the_device_still_reads_it() -> None:
    """The device sleeps in front of every copy, on two streams in turn."""
    device = torch.device("cuda", 0)
    ring = StagingRing(device, sizes=(2 << 20,))
    streams = [torch.cuda.Stream(device), torch.cuda.Stream(device)]
    sources = [torch.full((1 << 20,), n, dtype=torch.uint8) for n in range(8)]
    there = [torch.zeros(1 << 20, dtype=torch.uint8, device=device) for _ in sources]
    torch.cuda.synchronize()

    def make(first: int, part: torch.Tensor) -> None:
        part.fill_(number)

    for number, to in enumerate(there):
        with torch.cuda.stream(streams[number % 2]):
            torch.cuda._sleep(20_000_000)
            for _, part in ring.fill(1, 1 << 20, make):
                to.copy_(part[0])
    torch.cuda.synchronize()
    for number, to in enumerate(there):
        assert bool((to == number).all()), number
    ring.close()
