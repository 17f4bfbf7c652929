"""A driver for the tests of pinned memory on a machine without a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fake_driver import FakeDriver

from ds_offload.memory import host_block, page_locking, pinned_pool
from ds_offload.memory.host_block import PAGE


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDriver]:
    """A driver in the place of CUDA's; no test may leave anything registered."""
    fake = FakeDriver()
    monkeypatch.setattr(page_locking, "lock_pages", fake.lock)
    monkeypatch.setattr(page_locking, "unlock_pages", fake.unlock)
    monkeypatch.setattr(page_locking, "synchronize", fake.synchronize)
    monkeypatch.setattr(pinned_pool, "place_near", lambda device, address, size: None)
    monkeypatch.setattr(host_block, "SMALLEST_PIECE", 4 * PAGE)
    monkeypatch.setattr(host_block, "PART_BYTES", 2 * PAGE)
    yield fake
    assert fake.registered == {}
