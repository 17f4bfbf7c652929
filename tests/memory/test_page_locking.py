"""Memory that the real driver page-locks, or refuses to: copies and kernels reach it, and no error is left pending."""

from __future__ import annotations

import threading

import pytest
import torch

from ds_offload.errors import MemoryPlanError
from ds_offload.memory import host_block, page_locking
from ds_offload.memory.pinned_pool import PinnedPool

CUDA = torch.device("cuda", 0)
MIB = 1 << 20


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
