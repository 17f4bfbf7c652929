"""Pinned blocks: refusals, blocks made ahead, and nothing left on any way out. The driver is a fake but for `gpu`."""

from __future__ import annotations

import errno
import gc
import mmap
import os
import subprocess
import sys
import threading
import weakref
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from fake_driver import FakeDriver

from ds_offload.errors import MemoryPlanError
from ds_offload.machine.host_memory import memlock_limit
from ds_offload.memory import host_block, page_locking, preparation
from ds_offload.memory.host_block import PAGE, HostBlock
from ds_offload.memory.pinned_pool import PinnedPool

ROOT = Path(__file__).resolve().parents[2]
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
MIB = 1 << 20


@pytest.mark.parametrize("nbytes", [1, 3, PAGE, 5 * PAGE + 7])
@pytest.mark.parametrize("device", [CPU, CUDA])
def test_blocks_are_zeroed_and_distinct(nbytes: int, device: torch.device, driver: FakeDriver) -> None:
    with PinnedPool(device) as pool:
        assert pool.nbytes == pool.pinned_bytes == 0
        blocks = [pool.allocate(nbytes) for _ in range(3)]
        for number, block in enumerate(blocks):
            assert block.shape == (nbytes,) and block.dtype == torch.uint8 and not block.any()
            block.fill_(number + 1)
        assert [int(block.unique()) for block in blocks] == [1, 2, 3]
        whole = 3 * -(-nbytes // PAGE) * PAGE
        assert pool.nbytes == whole
        assert pool.pinned_bytes == sum(driver.registered.values()) == (whole if device is CUDA else 0)
    assert pool.nbytes == pool.pinned_bytes == 0
    assert driver.synchronized == (device is CUDA)


@pytest.mark.parametrize(("nbytes", "grain"), [(0, None), (-1, None), (10, 0), (10, -4)])
def test_sizes_below_one_are_refused(nbytes: int, grain: int | None) -> None:
    with PinnedPool(CPU) as pool:
        for ask in (pool.allocate, pool.begin):
            with pytest.raises(ValueError, match="must be at least 1"):
                ask(nbytes, grain=grain)


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


def test_parts_are_locked_in_order_across_blocks(driver: FakeDriver) -> None:
    with PinnedPool(CUDA) as pool:
        blocks = pool.begin(7 * PAGE - 9, blocks=3, grain=PAGE // 2, part=PAGE)
        assert [block.numel() for block in blocks] == [7 * PAGE - 9] * 3 and pool.busy
        for block in blocks:
            pool.wait(block)
        bases = [block.data_ptr() for block in blocks]
        assert list(driver.registered.items()) == [
            (base + start * PAGE, pages * PAGE) for start, pages in ((0, 2), (2, 2), (4, 2), (6, 1)) for base in bases
        ]
        assert pool.pinned_bytes == pool.nbytes == 21 * PAGE and not pool.busy
        assert all(name.startswith("pinned-pool") for name in driver.threads)
    assert not any(thread.name.startswith("pinned-pool") for thread in threading.enumerate())


@pytest.mark.parametrize(("part", "ends"), [(None, [11]), (1, [2, 4, 6, 8, 10, 11]), (3, [3, 6, 9, 11]), (11, [11])])
def test_parts_end_at_whole_pages_and_parts(part: int | None, ends: list[int], driver: FakeDriver) -> None:
    layout = host_block.BlockLayout(11 * PAGE - 1, 1, None if part is None else part * PAGE)
    assert layout.ends == [end * PAGE for end in ends]
    # Parts of half a page more end on a page every other time.
    odd = host_block.BlockLayout(20 * PAGE, 1, 3 * PAGE // 2)
    assert odd.ends == [end * PAGE for end in (3, 6, 9, 12, 15, 18, 20)]
    with pytest.raises(ValueError, match="multiple of grain"):
        host_block.BlockLayout(20 * PAGE, 3, 7)


def test_a_block_may_be_written_as_far_as_it_is_locked(driver: FakeDriver) -> None:
    gate = threading.Semaphore(0)

    def gated(device: torch.device, address: int, size: int) -> int:
        assert gate.acquire(timeout=10)
        return driver.lock(device, address, size)

    with pytest.MonkeyPatch.context() as patch, PinnedPool(CUDA) as pool:
        patch.setattr(page_locking, "lock_pages", gated)
        one, other = pool.begin(8 * PAGE, blocks=2, part=2 * PAGE)
        assert not pool.is_ready(one, 1)
        gate.release(3)
        pool.wait(one, 4 * PAGE)
        assert pool.is_ready(one, 4 * PAGE) and pool.is_ready(other, 2 * PAGE)
        assert not pool.is_ready(one, 4 * PAGE + 1) and not pool.is_ready(other, 2 * PAGE + 1)
        gate.release(5)
        pool.wait(other)
        assert pool.is_ready(one, 8 * PAGE) and pool.pinned_bytes == 16 * PAGE


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


def test_pages_are_there_before_they_are_locked(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    touched: list[tuple[int, int]] = []
    touch = preparation.touch

    def noted(address: int, size: int) -> None:
        touch(address, size)
        touched.append((address, size))

    def lock(device: torch.device, address: int, size: int) -> int:
        assert sum(length for start, length in touched if address <= start < address + size) == size
        return driver.lock(device, address, size)

    monkeypatch.setattr(preparation, "touch", noted)
    monkeypatch.setattr(preparation, "TOUCH_BYTES", 3 * PAGE)
    monkeypatch.setattr(page_locking, "lock_pages", lock)
    with PinnedPool(CUDA) as pool:
        for block in pool.begin(40 * PAGE, blocks=3, part=8 * PAGE):
            pool.wait(block)
        assert len(touched) == 3 * 5 * 3


@pytest.mark.parametrize("populates", [False, True])
def test_touching_takes_memory_and_leaves_zeros(populates: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not populates:
        monkeypatch.setattr(host_block, "_populate", lambda address, size: errno.EINVAL)
    block = HostBlock.map(host_block.BlockLayout(32 * MIB), CPU)
    before = resident_bytes()
    host_block.touch(block.address, 32 * MIB)
    assert resident_bytes() >= before + 30 * MIB
    assert not block.tensor().any()
    block.release()
    assert resident_bytes() < before + 8 * MIB


@pytest.mark.parametrize("code", [errno.ENOMEM, errno.EFAULT])
def test_memory_that_is_not_there_is_an_error_and_no_signal(
    code: int, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_block, "_populate", lambda address, size: code)
    with PinnedPool(CUDA) as pool, pytest.raises(MemoryError, match="host memory for the KV cache"):
        pool.allocate(8 * PAGE)
    assert pool.nbytes == 0


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_close_joins_the_thread_and_releases_blocks_nobody_took(
    error: type[BaseException], driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, go_on = threading.Event(), threading.Event()
    touch = preparation.touch

    def slow_touch(address: int, size: int) -> None:
        started.set()
        go_on.wait(10)
        touch(address, size)

    monkeypatch.setattr(preparation, "touch", slow_touch)
    with pytest.raises(error), PinnedPool(CUDA) as pool:
        pool.begin(8 * PAGE, blocks=5)
        assert started.wait(10)
        threading.Timer(0.05, go_on.set).start()
        raise error
    assert pool.nbytes == pool.pinned_bytes == 0
    # The block that was being touched is not locked any more, and the others were not begun.
    assert driver.threads == []
    assert not any(thread.name.startswith("pinned-pool") for thread in threading.enumerate())


def test_an_interrupt_while_locking_leaves_nothing(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(device: torch.device, address: int, size: int) -> int:
        driver.lock(device, address, size)
        raise KeyboardInterrupt

    with PinnedPool(CUDA) as pool:
        pool.allocate(PAGE)
        monkeypatch.setattr(page_locking, "lock_pages", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pool.allocate(8 * PAGE)
        assert pool.nbytes == sum(driver.registered.values()) == PAGE


def test_blocks_are_released_where_waiting_for_the_device_fails(
    driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(device: torch.device) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(page_locking, "synchronize", broken)
    pool = PinnedPool(CUDA)
    pool.allocate(PAGE)
    with pytest.raises(RuntimeError, match="illegal"):
        pool.close()
    assert pool.nbytes == 0


def test_a_pool_can_be_closed_twice_and_used_again(driver: FakeDriver) -> None:
    pool = PinnedPool(CUDA)
    pool.close()
    for _ in range(2):
        pool.begin(2 * PAGE)
        assert not pool.allocate(2 * PAGE).any()
        pool.close()
        pool.close()


@pytest.mark.parametrize("first", [0, 1])
def test_an_adopted_block_goes_with_the_last_of_its_pools(driver: FakeDriver, first: int) -> None:
    with PinnedPool(CUDA) as owner, PinnedPool(CUDA) as other:
        block = owner.allocate(3 * PAGE)
        block.fill_(7)
        other.adopt(owner, block)
        assert other.nbytes == other.pinned_bytes == 3 * PAGE and len(driver.registered) == 1
        pools = (owner, other)
        pools[first].close()
        assert pools[first].nbytes == 0 and len(driver.registered) == 1 and bool((block == 7).all())
        pools[1 - first].close()
        assert not driver.registered
        with pytest.raises(ValueError, match="does not begin a block"):
            other.adopt(owner, block)


def resident_bytes() -> int:
    """Private memory of this process that is really there."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon in /proc/self/status")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_pages_go_back_even_while_a_tensor_is_left(driver: FakeDriver) -> None:
    before = resident_bytes()
    with PinnedPool(CUDA) as pool:
        kept = pool.allocate(64 * MIB)
        kept.fill_(1)
        assert resident_bytes() >= before + 60 * MIB
    assert resident_bytes() < before + 8 * MIB
    # It may not be used, and still must not end the process.
    assert int(kept[0]) == 0
    del kept


def test_mappings_go_with_the_last_tensor(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    mapped: list[weakref.ref[mmap.mmap]] = []
    make = HostBlock.map

    def recorded(layout: host_block.BlockLayout, device: torch.device) -> HostBlock:
        block = make(layout, device)
        mapped.append(weakref.ref(block.memory))
        return block

    monkeypatch.setattr(HostBlock, "map", recorded)
    driver.refuses = lambda size, held: size > 8 * PAGE
    with PinnedPool(CUDA) as pool:
        pool.allocate(8 * PAGE)
        with pytest.raises(MemoryPlanError):
            pool.allocate(16 * PAGE)
        kept = pool.begin(7 * PAGE, blocks=3)[1]
    gc.collect()
    assert len(mapped) >= 4 and sum(memory() is not None for memory in mapped) == 1
    del kept
    gc.collect()
    assert all(memory() is None for memory in mapped)


@pytest.mark.skipif(sys.platform == "win32", reason="no ulimit")
def test_memlock_does_not_matter_without_a_gpu() -> None:
    code = (
        "import torch; from ds_offload.memory.pinned_pool import PinnedPool\n"
        "from ds_offload.machine.host_memory import memlock_limit; assert memlock_limit() == 65536\n"
        "with PinnedPool(torch.device('cpu')) as pool:\n"
        "    pool.begin(1 << 20)[0].fill_(1); pool.allocate(8 << 20).fill_(2)\n"
        "    print(pool.nbytes, pool.pinned_bytes)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    child = subprocess.run(
        ["bash", "-c", 'ulimit -l 64 && exec "$0" -c "$1"', sys.executable, code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert child.returncode == 0, child.stderr
    assert child.stdout.split() == [str(9 << 20), "0"] and child.stderr == ""


def pinned_and_right(block: torch.Tensor) -> None:
    """Copies both ways without waiting, and a kernel that reads the block in place, give its bytes."""
    device = torch.arange(block.numel(), device="cuda").to(torch.uint8)
    block.copy_(device, non_blocking=True)
    torch.cuda.synchronize()
    assert torch.equal(block, device.cpu())
    assert torch.equal(block.cuda(non_blocking=True), device)


@pytest.mark.gpu
def test_blocks_are_page_locked() -> None:
    with PinnedPool(CUDA) as pool:
        blocks = [*pool.begin(3 * MIB, blocks=2), pool.allocate(MIB + 5)]
        for block in blocks:
            pool.wait(block)
            assert block.is_pinned()
            pinned_and_right(block)
        assert pool.pinned_bytes == pool.nbytes >= 7 * MIB
    assert not any(block.is_pinned() for block in blocks)


@pytest.mark.gpu
def test_a_real_refusal_leaves_no_error_behind_in_its_thread_or_another() -> None:
    with PinnedPool(CUDA) as pool:
        block = pool.allocate(MIB)
        address = block.data_ptr()
        # Registered already: refused, with a pending error until it is cleared.
        assert page_locking.lock_pages(CUDA, address, MIB) != 0
        assert int(torch.ones(1000, device="cuda").add_(1).sum()) == 2000
        failures: list[BaseException] = []

        def in_background() -> None:
            try:
                assert page_locking.lock_pages(CUDA, address, MIB) != 0
                assert int(torch.ones(1000, device="cuda").add_(1).sum()) == 2000
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=in_background)
        thread.start()
        thread.join()
        assert failures == []
        torch.cuda.synchronize()
        # Neither is one left by letting go of what is not registered.
        page_locking.unlock_pages(CUDA, address)
        page_locking.unlock_pages(CUDA, address)
        assert int(torch.ones(1000, device="cuda").add_(1).sum()) == 2000
        assert page_locking.lock_pages(CUDA, address, MIB) == 0


@pytest.mark.gpu
def test_torch_clears_the_error_where_the_runtime_library_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_locking, "cuda_runtime", lambda: None)
    with PinnedPool(CUDA) as pool:
        address = pool.allocate(MIB).data_ptr()
        assert page_locking.lock_pages(CUDA, address, MIB) != 0
        assert int(torch.ones(1000, device="cuda").add_(1).sum()) == 2000


@pytest.mark.gpu
def test_a_block_registered_in_pieces_is_read_and_written_grain_by_grain(monkeypatch: pytest.MonkeyPatch) -> None:
    register = page_locking.lock_pages

    def no_large_ones(device: torch.device, address: int, size: int) -> int:
        return 2 if size > 3 * MIB else register(device, address, size)

    monkeypatch.setattr(page_locking, "lock_pages", no_large_ones)
    monkeypatch.setattr(host_block, "SMALLEST_PIECE", MIB)
    with PinnedPool(CUDA) as pool:
        block = pool.allocate(8 * MIB, grain=MIB // 2)
        assert len(pool._blocks[block.data_ptr()].pieces) > 2
        for grain in block.split(MIB // 2):
            pinned_and_right(grain)
    assert pool.pinned_bytes == 0


@pytest.mark.gpu
def test_parts_that_are_locked_one_by_one_are_copied_and_read_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_block, "PART_BYTES", MIB)
    with PinnedPool(CUDA) as pool:
        blocks = pool.begin(8 * MIB, blocks=3, grain=MIB // 2, part=MIB)
        for first in range(0, 8, 1):
            for block in blocks:
                pool.wait(block, (first + 1) * MIB)
                pinned_and_right(block[first * MIB : (first + 1) * MIB])
        assert all(len(pool._blocks[block.data_ptr()].pieces) == 8 for block in blocks)
    assert pool.pinned_bytes == 0


@pytest.mark.gpu
def test_a_refused_pin_names_the_driver_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_locking, "lock_pages", lambda device, address, size: 2)
    with PinnedPool(CUDA) as pool, pytest.raises(MemoryPlanError, match="CUDA error 2: out of memory"):
        pool.allocate(MIB)
