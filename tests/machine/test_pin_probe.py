"""The probe of page-locked memory against a pool that refuses above a bound."""

from __future__ import annotations

import pytest
import torch

from ds_offload.errors import MemoryPlanError
from ds_offload.machine import pin_probe
from ds_offload.machine.pin_probe import PinProbe, probe_pinned
from ds_offload.memory.pinned_pool import PinnedPool

MIB = 1 << 20
CUDA = torch.device("cuda", 0)


class FakePool:
    """Hands out nothing, and refuses beyond `bound` bytes."""

    bound = 0
    asked: list[int]
    closed = 0

    def __init__(self, device: torch.device) -> None:
        assert device == CUDA
        self.held = 0
        FakePool.asked, FakePool.closed = [], 0

    def __enter__(self) -> FakePool:
        return self

    def __exit__(self, *error: object) -> None:
        FakePool.closed += 1

    def allocate(self, nbytes: int) -> None:
        self.asked.append(nbytes)
        if self.held + nbytes > self.bound:
            raise MemoryPlanError("refused")
        self.held += nbytes


@pytest.fixture(autouse=True)
def fake_pool(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setattr(pin_probe, "PinnedPool", FakePool)


@pytest.mark.parametrize("limit", [1, 63 * MIB, 256 * MIB, 1000 * MIB, 16384 * MIB])
def test_all_of_the_limit_is_locked_where_nothing_refuses(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakePool, "bound", 1 << 60)
    assert probe_pinned(CUDA, limit) == PinProbe(limit, None)
    assert FakePool.closed == 1
    held = 0
    for asked in FakePool.asked:
        assert asked == min(max(held, 256 * MIB), limit - held)
        held += asked


@pytest.mark.parametrize("bound", [0, 10 * MIB, 64 * MIB, 700 * MIB, 3000 * MIB])
def test_a_refusal_is_closed_in_on(bound: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakePool, "bound", bound)
    probe = probe_pinned(CUDA, 16384 * MIB)
    assert probe.refusal == "refused" and FakePool.closed == 1
    assert max(0, bound - 128 * MIB) <= probe.pinned_bytes <= bound
    assert min(FakePool.asked) >= 64 * MIB and len(FakePool.asked) < 20


def test_the_limit_must_be_positive() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        probe_pinned(CUDA, 0)


def test_an_interrupt_closes_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: FakePool, nbytes: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(FakePool, "allocate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        probe_pinned(CUDA, MIB)
    assert FakePool.closed == 1


@pytest.mark.gpu
def test_the_driver_locks_and_lets_go() -> None:
    assert probe_pinned(CUDA, 600 * MIB) == PinProbe(600 * MIB, None)
    with PinnedPool(CUDA) as pool:
        assert pool.pinned_bytes == 0
