"""Pinned blocks: made ahead, ready part by part, and nothing left on any way out. The driver is a fake."""

from __future__ import annotations

import errno
import gc
import mmap
import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import pytest
import torch
from fake_driver import FakeDriver

from ds_offload.errors import MemoryPlanError
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
