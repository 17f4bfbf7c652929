"""Blocks that the driver refuses to lock: tried in pieces, left pageable, said once. The driver is a fake."""

from __future__ import annotations

import gc
import weakref
from itertools import pairwise

import pytest
import torch
from fake_driver import FakeDriver

from ds_offload.errors import MemoryPlanError
from ds_offload.machine.host_memory import memlock_limit
from ds_offload.memory.host_block import PAGE
from ds_offload.memory.pinned_pool import PinnedPool

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def test_a_refusal_is_one_line_with_cause_cost_and_cure_and_leaves_the_rest(driver: FakeDriver) -> None:
    driver.refuses = lambda size, held: held + size > 20 * PAGE
    with PinnedPool(CUDA) as pool:
        kept = pool.allocate(16 * PAGE)
        kept.fill_(7)
        with pytest.raises(MemoryPlanError) as refused:
            pool.allocate(16 * PAGE)
        text = str(refused.value)
        limit = memlock_limit()
        memlock = "unlimited" if limit is None else f"{limit // 1024:,} KiB"
        assert f"memlock is {memlock}" in text and "CUDA error 2" in text
        assert "cannot read it in place" in text and "ulimit -l unlimited" in text and "--ulimit memlock=-1" in text
        assert "\n" not in text
        assert pool.nbytes == pool.pinned_bytes == 16 * PAGE and bool((kept == 7).all())
        assert pool.allocate(4 * PAGE).numel() == 4 * PAGE
    assert pool.nbytes == 0


def test_a_refusal_keeps_no_frame_alive(driver: FakeDriver) -> None:
    """What the callers of a refused pool hold, tensors on the device for one, goes when the refusal is dealt with."""
    driver.refuses = lambda size, held: True

    def ask(pool: PinnedPool) -> weakref.ref[torch.Tensor]:
        held = torch.zeros(1)
        try:
            pool.allocate(PAGE)
        except MemoryPlanError:
            return weakref.ref(held)
        raise AssertionError("was not refused")

    gc.disable()
    try:
        with PinnedPool(CUDA) as pool:
            assert ask(pool)() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("together", [False, True])
def test_with_a_cost_to_name_the_pool_goes_on_with_pageable_blocks_and_says_so_once(
    together: bool, driver: FakeDriver, capsys: pytest.CaptureFixture[str]
) -> None:
    driver.refuses = lambda size, held: held + size > 40 * PAGE
    with PinnedPool(CUDA, "rows take a detour") as pool:
        if together:
            blocks = pool.begin(16 * PAGE, blocks=5, grain=PAGE)
        else:
            blocks = [pool.allocate(16 * PAGE, grain=PAGE) for _ in range(5)]
        for block in blocks:
            pool.wait(block)
        assert [pool.left_pageable(block) for block in blocks] == [False, False, True, True, True]
        assert pool.refusals == (3 if together else 1) and not pool.busy
        assert pool.nbytes == 80 * PAGE
        # A block is locked whole or not at all, and nothing is tried behind the first refusal.
        assert pool.pinned_bytes == sum(driver.registered.values()) == 32 * PAGE
        tried = len(driver.threads)
        for number, block in enumerate(blocks):
            assert not block.any()
            block.fill_(number + 1)
        assert pool.left_pageable(pool.allocate(PAGE)) and len(driver.threads) == tried
        assert [int(block.unique()) for block in blocks] == [1, 2, 3, 4, 5]
        lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "CUDA error 2" in lines[0] and "memlock is" in lines[0] and "rows take a detour" in lines[0]
    assert "ulimit -l unlimited" in lines[0]
    assert pool.nbytes == pool.pinned_bytes == 0


def test_on_a_cpu_no_block_counts_as_pageable() -> None:
    with PinnedPool(CPU, "never said") as pool:
        assert not pool.left_pageable(pool.allocate(PAGE))


def test_a_block_that_is_refused_as_a_whole_is_locked_in_pieces_of_whole_grains(driver: FakeDriver) -> None:
    driver.refuses = lambda size, held: size > 9 * PAGE
    grain = 3 * PAGE // 2
    with PinnedPool(CUDA) as pool:
        block = pool.allocate(33 * PAGE, grain=grain)
        start = block.data_ptr()
        pieces = sorted((address - start, size) for address, size in driver.registered.items())
        assert pieces[0][0] == 0 and len(pieces) > 1
        for (one, size), (other, _) in pairwise(pieces):
            assert one + size == other and other % grain == 0 and other % PAGE == 0
        assert sum(size for _, size in pieces) == pool.pinned_bytes == 33 * PAGE
        assert max(size for _, size in pieces) <= 9 * PAGE


def test_a_block_without_a_grain_is_not_split(driver: FakeDriver) -> None:
    driver.refuses = lambda size, held: size > 9 * PAGE
    with PinnedPool(CUDA) as pool, pytest.raises(MemoryPlanError):
        pool.allocate(32 * PAGE)
    assert len(driver.threads) == 1


def test_pieces_that_were_taken_are_let_go_when_a_later_one_is_refused(driver: FakeDriver) -> None:
    driver.refuses = lambda size, held: held + size > 12 * PAGE
    with PinnedPool(CUDA) as pool:
        with pytest.raises(MemoryPlanError):
            pool.allocate(32 * PAGE, grain=PAGE)
        assert driver.most > 0 and driver.registered == {} and pool.nbytes == 0
    # No piece is smaller than the smallest.
    assert driver.most % (4 * PAGE) == 0


def test_after_a_refusal_whole_blocks_take_what_parts_of_others_gave_back(
    driver: FakeDriver, capsys: pytest.CaptureFixture[str]
) -> None:
    driver.refuses = lambda size, held: held + size > 41 * PAGE
    with PinnedPool(CUDA, "rows take a detour") as pool:
        blocks = pool.begin(16 * PAGE, blocks=5, grain=PAGE, part=2 * PAGE)
        # What is written to the parts that are there stays.
        for number, block in enumerate(blocks):
            pool.wait(block, 2 * PAGE)
            block[: 2 * PAGE] = number + 1
        for block in blocks:
            pool.wait(block, 10 * PAGE)
        # Forty pages were taken in parts of all five: two whole blocks are made of them.
        assert [pool.left_pageable(block) for block in blocks] == [False, False, True, True, True]
        assert pool.refusals == 3 and driver.synchronized == 1
        assert pool.pinned_bytes == sum(driver.registered.values()) == 32 * PAGE
        for number, block in enumerate(blocks):
            assert bool((block[: 2 * PAGE] == number + 1).all()) and not block[2 * PAGE :].any()
    assert capsys.readouterr().err.count("rows take a detour") == 1


def test_a_block_that_is_refused_again_is_left_pageable(driver: FakeDriver) -> None:
    left = 9

    def refuses(size: int, held: int) -> bool:
        nonlocal left
        left -= 1
        return left < 0

    driver.refuses = refuses
    with PinnedPool(CUDA, "rows take a detour") as pool:
        blocks = pool.begin(8 * PAGE, blocks=3, grain=PAGE, part=2 * PAGE)
        for block in blocks:
            pool.wait(block)
        assert [pool.left_pageable(block) for block in blocks] == [True] * 3
        assert pool.pinned_bytes == 0 and driver.registered == {}


def test_a_refusal_in_the_background_is_raised_by_who_waits(driver: FakeDriver) -> None:
    driver.refuses = lambda size, held: held > 0
    with PinnedPool(CUDA) as pool:
        one, other = pool.begin(8 * PAGE, blocks=2)
        pool.wait(one)
        for _ in range(2):
            with pytest.raises(MemoryPlanError, match="refused"):
                pool.wait(other)
        assert pool.pinned_bytes == 8 * PAGE
