"""A store with pageable segments gives and takes what one without gives and takes, bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from ds_offload.kernels.gather import gather_rows_reference
from ds_offload.memory import staging_ring
from ds_offload.memory.kv_store import KVStore
from ds_offload.memory.pinned_pool import PinnedPool
from ds_offload.memory.staged_rows import StagedRows

DEVICES = [torch.device("cpu"), pytest.param(torch.device("cuda", 0), marks=pytest.mark.gpu)]
SEGMENT, HEADS, DIM = 8, 3, 4
LENGTHS = [29, 9]
# Which of the segments, in the order they are made, the driver refuses.
REFUSALS: dict[str, Callable[[int], bool]] = {
    "none": lambda n: False,
    "all": lambda n: True,
    "some": lambda n: n in (1, 2, 4),
    "later": lambda n: n > 2,
}


class RefusingPool(PinnedPool):
    """Leaves blocks pageable as `refuses` says, by their number, on a CPU too."""

    def __init__(self, device: torch.device, refuses: Callable[[int], bool]) -> None:
        super().__init__(device)
        self._refuses = refuses
        self._given: list[int] = []
        self._plain = PinnedPool(torch.device("cpu"))

    def begin(
        self, nbytes: int, *, blocks: int = 1, grain: int | None = None, part: int | None = None
    ) -> list[torch.Tensor]:
        made = []
        for _ in range(blocks):
            refused = self._refuses(len(self._given))
            made += (self._plain if refused else super()).begin(nbytes, grain=grain, part=part)
            self._given.append(made[-1].data_ptr() if refused else 0)
        return made

    def left_pageable(self, block: torch.Tensor) -> bool:
        return block.data_ptr() in self._given


@pytest.fixture(autouse=True)
def small_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few rows at a time, so that buffers are used many times over."""
    monkeypatch.setattr(staging_ring.StagingRing.__init__, "__defaults__", ((640,),))


def make(pool: PinnedPool, device: torch.device, dtype: torch.dtype) -> KVStore:
    store = KVStore(
        layers=[0, 2], sequences=2, kv_heads=HEADS, head_dim=DIM, dtype=dtype, device=device, pool=pool,
        segment_tokens=SEGMENT, max_tokens=max(LENGTHS) + 20,
    )  # fmt: skip
    for number, length in enumerate(LENGTHS):
        store.reserve(number, length)
    return store


def random_rows(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    rows = torch.randn(*shape, 2, DIM, generator=torch.Generator().manual_seed(shape[-1]))
    return (rows * 50).to(dtype).to(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("refused", REFUSALS)
def test_prompts_steps_and_gathers(refused: str, dtype: torch.dtype, device: torch.device) -> None:
    with RefusingPool(device, REFUSALS[refused]) as pool:
        store = make(pool, device, dtype)
        assert store.staged == (refused != "none")
        expected = []
        for number, length in enumerate(LENGTHS):
            rows = random_rows(HEADS, length + 6, dtype=dtype, device=device)
            for start, stop in ((0, 3), (3, length)):
                store.write_prompt(2, number, start, rows[:, start:stop])
            expected.append(rows)
        for step in range(6):
            at = torch.tensor(LENGTHS) + step
            for number, token in enumerate(at.tolist()):
                store.reserve(number, token + 1)
            new = torch.stack([rows[:, int(token)] for rows, token in zip(expected, at, strict=True)])
            store.append(0, at.to(device), torch.zeros_like(new))
            store.append(2, at.to(device), new)
        for number, rows in enumerate(expected):
            out = torch.zeros_like(rows[:, 2:])
            store.read(2, number, 2, out)
            assert torch.equal(out, rows[:, 2:])
            parts = torch.cat(list(store.parts(2, number, 0, rows.shape[1])))
            assert torch.equal(parts, rows.flatten(0, 1).cpu())
        check_gather(store, device)
        store.close()


def check_gather(store: KVStore, device: torch.device) -> None:
    """Against the reference, with padding, with counts, and with slots in any order."""
    generator = torch.Generator().manual_seed(1)
    for counted in (False, True):
        tokens = torch.stack(
            [
                torch.stack([torch.randperm(length + 6, generator=generator)[:11] for _ in range(HEADS)])
                for length in LENGTHS
            ]
        )
        tokens[0, 1, 3:6] = -1
        slots = torch.stack([torch.randperm(20, generator=generator)[:11] for _ in range(2 * HEADS)])
        slots = slots.view(2, HEADS, 11).to(device)
        counts = torch.tensor([[0, 4, 11], [1, 8, 2]], dtype=torch.int32, device=device) if counted else None
        if counts is not None:
            # What stands behind the counts is not looked at.
            tokens[torch.arange(11) >= counts[..., None].cpu()] = 10**9
        expected = torch.zeros(2, HEADS, 20, 2, DIM, dtype=store.dtype, device=device)
        out = expected.clone()
        gather_rows_reference(store.table, 1, tokens.to(device), slots, expected, counts)
        store.gather(2, tokens.to(device), slots, out, counts)
        assert torch.equal(out, expected) and bool(out.any())


def test_a_token_without_a_segment_is_told() -> None:
    device = torch.device("cpu")
    with RefusingPool(device, lambda n: True) as pool:
        store = make(pool, device, torch.float32)
        out = torch.zeros(2, HEADS, 4, 2, DIM)
        tokens = torch.full((2, HEADS, 1), 47)
        with pytest.raises(ValueError, match="6 tokens have no segment"):
            store.gather(0, tokens, torch.zeros_like(tokens), out)


def test_no_kernel_has_the_address_of_a_pageable_segment() -> None:
    with RefusingPool(torch.device("cpu"), REFUSALS["some"]) as pool:
        store = make(pool, torch.device("cpu"), torch.float32)
        known = [[bool(address) for address in row[:4]] for row in store.table.addresses.tolist()]
    assert known == [[True, False, False, True], [False, True, False, False]]


def test_a_store_without_refusals_makes_no_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(self: StagedRows, *arguments: object) -> None:
        raise AssertionError("a ring was made")

    monkeypatch.setattr(StagedRows, "__init__", never)
    with RefusingPool(torch.device("cpu"), REFUSALS["none"]) as pool:
        store = make(pool, torch.device("cpu"), torch.float32)
        assert not store.staged and store.ring_bytes == 0
    with RefusingPool(torch.device("cpu"), REFUSALS["all"]) as pool, pytest.raises(AssertionError, match="a ring"):
        make(pool, torch.device("cpu"), torch.float32)
