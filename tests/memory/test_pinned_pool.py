"""Pinned blocks: refusals, blocks made ahead, and nothing left on any way out. The driver is a fake but for `gpu`."""

from __future__ import annotations

import gc
import mmap
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from ds_offload.errors import MemoryPlanError
from ds_offload.machine.host_memory import memlock_limit
from ds_offload.memory import pinned_pool
from ds_offload.memory.pinned_pool import PinnedPool

ROOT = Path(__file__).resolve().parents[2]
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
MIB, PAGE = 1 << 20, pinned_pool._PAGE


class FakeDriver:
    """Keeps what is registered, and refuses what `refuses(size, held)` says."""

    def __init__(self) -> None:
        self.registered: dict[int, int] = {}
        self.threads: list[str] = []
        self.synchronized = 0
        self.refuses: Callable[[int, int], bool] = lambda size, held: False
        self.most = 0

    def register(self, device: torch.device, address: int, size: int) -> int:
        assert device == CUDA and address % PAGE == 0 and size % PAGE == 0 and size > 0
        self.threads.append(threading.current_thread().name)
        if self.refuses(size, sum(self.registered.values())):
            return 2
        for start, length in self.registered.items():
            assert address + size <= start or start + length <= address, "registered twice"
        self.registered[address] = size
        self.most = max(self.most, sum(self.registered.values()))
        return 0

    def unregister(self, device: torch.device, address: int) -> None:
        assert self.registered.pop(address, None), "was not registered"

    def synchronize(self, device: torch.device) -> None:
        self.synchronized += 1


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDriver]:
    """A driver in the place of CUDA's; no test may leave anything registered."""
    fake = FakeDriver()
    monkeypatch.setattr(pinned_pool, "_register", fake.register)
    monkeypatch.setattr(pinned_pool, "_unregister", fake.unregister)
    monkeypatch.setattr(pinned_pool, "_synchronize", fake.synchronize)
    monkeypatch.setattr(pinned_pool, "place_near", lambda device, address, size: None)
    monkeypatch.setattr(pinned_pool, "_SMALLEST_PIECE", 4 * PAGE)
    yield fake
    assert fake.registered == {}


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
        for ask in (pool.allocate, pool.prepare):
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


@pytest.mark.parametrize("ahead", [False, True])
def test_with_a_cost_to_name_the_pool_goes_on_with_pageable_blocks_and_says_so_once(
    ahead: bool, driver: FakeDriver, capsys: pytest.CaptureFixture[str]
) -> None:
    driver.refuses = lambda size, held: held + size > 40 * PAGE
    with PinnedPool(CUDA, "rows take a detour") as pool:
        if ahead:
            pool.prepare(16 * PAGE, blocks=5, grain=PAGE)
        blocks = [pool.allocate(16 * PAGE, grain=PAGE) for _ in range(5)]
        assert [pool.left_pageable(block) for block in blocks] == [False, False, True, True, True]
        assert pool.nbytes == 80 * PAGE
        # A block is registered whole or not at all, and nothing is tried behind the first refusal.
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


def test_a_block_that_is_refused_as_a_whole_is_registered_in_pieces_of_whole_grains(driver: FakeDriver) -> None:
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


def test_allocate_takes_what_prepare_made_in_order_and_makes_the_rest_itself(driver: FakeDriver) -> None:
    with PinnedPool(CUDA) as pool:
        pool.prepare(5 * PAGE - 9, blocks=2)
        pool.prepare(3 * PAGE)
        blocks = [pool.allocate(5 * PAGE - 9) for _ in range(3)] + [pool.allocate(3 * PAGE)]
        assert [block.numel() for block in blocks] == [5 * PAGE - 9] * 3 + [3 * PAGE]
        assert len({block.data_ptr() for block in blocks}) == 4
        assert sum(name.startswith("pinned-pool") for name in driver.threads) == 3
        assert pool.pinned_bytes == pool.nbytes == 18 * PAGE
    assert not any(thread.name.startswith("pinned-pool") for thread in threading.enumerate())


def test_a_block_prepared_with_another_size_or_grain_is_left(driver: FakeDriver) -> None:
    with PinnedPool(CUDA) as pool:
        pool.prepare(5 * PAGE)
        pool.allocate(4 * PAGE)
        pool.allocate(5 * PAGE, grain=PAGE)
        pool.allocate(5 * PAGE)
        assert pool.nbytes == 14 * PAGE


def test_a_refusal_in_the_background_is_raised_by_the_allocate_that_takes_the_block(driver: FakeDriver) -> None:
    driver.refuses = lambda size, held: held > 0
    with PinnedPool(CUDA) as pool:
        pool.prepare(8 * PAGE, blocks=2)
        pool.allocate(8 * PAGE)
        with pytest.raises(MemoryPlanError, match="refused"):
            pool.allocate(8 * PAGE)
        assert pool.nbytes == 8 * PAGE


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_close_joins_the_thread_and_releases_blocks_nobody_took(
    error: type[BaseException], driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, go_on = threading.Event(), threading.Event()
    touch = pinned_pool._touch

    def slow_touch(address: int, size: int) -> None:
        started.set()
        go_on.wait(10)
        touch(address, size)

    monkeypatch.setattr(pinned_pool, "_touch", slow_touch)
    with pytest.raises(error), PinnedPool(CUDA) as pool:
        pool.prepare(8 * PAGE, blocks=5)
        assert started.wait(10)
        threading.Timer(0.05, go_on.set).start()
        raise error
    assert pool.nbytes == pool.pinned_bytes == 0
    # The block that was being touched is not registered any more, and the others were not begun.
    assert driver.threads == []
    assert not any(thread.name.startswith("pinned-pool") for thread in threading.enumerate())


def test_an_interrupt_while_registering_leaves_nothing(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(device: torch.device, address: int, size: int) -> int:
        driver.register(device, address, size)
        raise KeyboardInterrupt

    with PinnedPool(CUDA) as pool:
        pool.allocate(PAGE)
        monkeypatch.setattr(pinned_pool, "_register", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pool.allocate(8 * PAGE)
        assert pool.nbytes == sum(driver.registered.values()) == PAGE


def test_blocks_are_released_where_waiting_for_the_device_fails(
    driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(device: torch.device) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(pinned_pool, "_synchronize", broken)
    pool = PinnedPool(CUDA)
    pool.allocate(PAGE)
    with pytest.raises(RuntimeError, match="illegal"):
        pool.close()
    assert pool.nbytes == 0


def test_a_pool_can_be_closed_twice_and_used_again(driver: FakeDriver) -> None:
    pool = PinnedPool(CUDA)
    pool.close()
    for _ in range(2):
        pool.prepare(2 * PAGE)
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
    make = pinned_pool._Block.map

    def recorded(size: int) -> pinned_pool._Block:
        block = make(size)
        mapped.append(weakref.ref(block.memory))
        return block

    monkeypatch.setattr(pinned_pool._Block, "map", recorded)
    driver.refuses = lambda size, held: size > 8 * PAGE
    with PinnedPool(CUDA) as pool:
        pool.allocate(8 * PAGE)
        with pytest.raises(MemoryPlanError):
            pool.allocate(16 * PAGE)
        pool.prepare(7 * PAGE, blocks=3)
        kept = pool.allocate(7 * PAGE)
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
        "    pool.prepare(1 << 20); pool.allocate(1 << 20).fill_(1); pool.allocate(8 << 20).fill_(2)\n"
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
        pool.prepare(3 * MIB, blocks=2)
        blocks = [pool.allocate(3 * MIB), pool.allocate(3 * MIB), pool.allocate(MIB + 5)]
        for block in blocks:
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
        assert pinned_pool._register(CUDA, address, MIB) != 0
        assert int(torch.ones(1000, device="cuda").add_(1).sum()) == 2000
        failures: list[BaseException] = []

        def in_background() -> None:
            try:
                assert pinned_pool._register(CUDA, address, MIB) != 0
                assert int(torch.ones(1000, device="cuda").add_(1).sum()) == 2000
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=in_background)
        thread.start()
        thread.join()
        assert failures == []
        torch.cuda.synchronize()
        # Neither is one left by letting go of what is not registered.
        pinned_pool._unregister(CUDA, address)
        pinned_pool._unregister(CUDA, address)
        assert int(torch.ones(1000, device="cuda").add_(1).sum()) == 2000
        assert pinned_pool._register(CUDA, address, MIB) == 0


@pytest.mark.gpu
def test_torch_clears_the_error_where_the_runtime_library_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinned_pool, "_cuda_runtime", lambda: None)
    with PinnedPool(CUDA) as pool:
        address = pool.allocate(MIB).data_ptr()
        assert pinned_pool._register(CUDA, address, MIB) != 0
        assert int(torch.ones(1000, device="cuda").add_(1).sum()) == 2000


@pytest.mark.gpu
def test_a_block_registered_in_pieces_is_read_and_written_grain_by_grain(monkeypatch: pytest.MonkeyPatch) -> None:
    register = pinned_pool._register

    def no_large_ones(device: torch.device, address: int, size: int) -> int:
        return 2 if size > 3 * MIB else register(device, address, size)

    monkeypatch.setattr(pinned_pool, "_register", no_large_ones)
    monkeypatch.setattr(pinned_pool, "_SMALLEST_PIECE", MIB)
    with PinnedPool(CUDA) as pool:
        block = pool.allocate(8 * MIB, grain=MIB // 2)
        assert len(pool._blocks[0].pieces) > 2
        for grain in block.split(MIB // 2):
            pinned_and_right(grain)
    assert pool.pinned_bytes == 0


@pytest.mark.gpu
def test_a_refused_pin_names_the_driver_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinned_pool, "_register", lambda device, address, size: 2)
    with PinnedPool(CUDA) as pool, pytest.raises(MemoryPlanError, match="CUDA error 2: out of memory"):
        pool.allocate(MIB)
