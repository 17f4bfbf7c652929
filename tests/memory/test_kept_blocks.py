"""Blocks kept from call to call: taken again by the same layout, never more than allowed, all released in the end."""

from __future__ import annotations

import pytest
import torch
from fake_driver import FakeDriver

from ds_offload.memory import page_locking
from ds_offload.memory.host_block import PAGE
from ds_offload.memory.kept_blocks import KeptBlocks
from ds_offload.memory.pinned_pool import PinnedPool

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def call(kept: KeptBlocks, pages: int, blocks: int, *, part: int = 1, keep: bool = True) -> list[int]:
    """What a call does with a pool; addresses of its blocks."""
    pool = PinnedPool(CUDA, "never said", kept)
    made = pool.begin(pages * PAGE, blocks=blocks, grain=PAGE, part=part * PAGE)
    for block in made:
        pool.wait(block)
        block.fill_(7)
    assert pool.pinned_bytes == pool.nbytes == pages * blocks * PAGE
    pool.close(keep)
    assert pool.nbytes == pool.pinned_bytes == 0
    return [block.data_ptr() for block in made]


def test_a_second_call_locks_only_what_the_first_did_not(driver: FakeDriver) -> None:
    kept = KeptBlocks()
    first = call(kept, 8, 3)
    assert kept.nbytes == sum(driver.registered.values()) == 24 * PAGE
    asked = len(driver.threads)
    assert call(kept, 8, 2) == first[:2] and len(driver.threads) == asked and kept.nbytes == 24 * PAGE
    assert set(first) < set(call(kept, 8, 5)) and len(driver.threads) == asked + 2 * 4
    assert kept.nbytes == 40 * PAGE
    kept.close()
    assert kept.nbytes == 0 and driver.registered == {}


def test_a_kept_block_is_ready_and_holds_what_was_written(driver: FakeDriver) -> None:
    kept = KeptBlocks()
    call(kept, 8, 1)
    with PinnedPool(CUDA, "never said", kept) as pool:
        one, other = pool.begin(8 * PAGE, blocks=2, grain=PAGE, part=PAGE)
        assert pool.is_ready(one, 8 * PAGE) and bool((one == 7).all())
        pool.wait(one)
        pool.wait(other)
        assert not other.any()
    kept.close()


@pytest.mark.parametrize(("pages", "part"), [(4, 1), (16, 1), (8, 2)])
def test_blocks_of_another_layout_are_given_back(pages: int, part: int, driver: FakeDriver) -> None:
    kept = KeptBlocks()
    call(kept, 8, 3)
    call(kept, pages, 2, part=part)
    assert kept.nbytes == sum(driver.registered.values()) == 2 * pages * PAGE
    kept.close()


def test_trimming_leaves_whole_blocks(driver: FakeDriver) -> None:
    kept = KeptBlocks()
    call(kept, 8, 3)
    for most, left in ((24, 24), (23, 16), (9, 8), (8, 8), (7, 0), (-5, 0)):
        kept.trim(most * PAGE)
        assert kept.nbytes == sum(driver.registered.values()) == left * PAGE


def test_after_an_error_nothing_is_kept_of_the_call(driver: FakeDriver) -> None:
    kept = KeptBlocks()
    call(kept, 8, 3, keep=False)
    assert kept.nbytes == 0 and driver.registered == {}


def test_only_whole_blocks_of_a_device_that_can_be_waited_for_are_kept(
    driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = KeptBlocks()
    driver.refuses = lambda size, held: held + size > 10 * PAGE
    pool = PinnedPool(CUDA, "said once", kept)
    for block in pool.begin(8 * PAGE, blocks=2, grain=PAGE, part=PAGE):
        pool.wait(block)
    pool.close()
    assert kept.nbytes == 8 * PAGE

    def broken(device: torch.device) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    pool.begin(8 * PAGE, grain=PAGE, part=PAGE)
    monkeypatch.setattr(page_locking, "synchronize", broken)
    with pytest.raises(RuntimeError, match="illegal"):
        pool.close()
    assert kept.nbytes == 0


def test_a_shared_block_is_kept_by_the_last_of_its_pools(driver: FakeDriver) -> None:
    kept = KeptBlocks()
    with PinnedPool(CUDA, "never said", kept) as owner, PinnedPool(CUDA, "never said", kept) as other:
        block = owner.allocate(4 * PAGE)
        other.adopt(owner, block)
        owner.close()
        assert kept.nbytes == 0 and other.nbytes == 4 * PAGE
    assert kept.nbytes == 4 * PAGE
    kept.close()


def test_behind_its_close_nothing_is_kept_and_nothing_on_a_cpu(driver: FakeDriver) -> None:
    kept = KeptBlocks()
    with PinnedPool(CPU, None, kept) as pool:
        pool.allocate(PAGE)
    assert kept.nbytes == 0
    kept.close()
    call(kept, 8, 1)
    assert kept.nbytes == 0 and driver.registered == {}
