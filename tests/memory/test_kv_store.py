"""Store: what is written comes back, wherever segments end; unequal lengths waste less than a segment."""

from __future__ import annotations

import pytest
import torch
from fake_driver import FakeDriver

from ds_offload.memory.host_block import PAGE
from ds_offload.memory.kv_store import KVStore
from ds_offload.memory.pinned_pool import PinnedPool

CPU = torch.device("cpu")
SEGMENT, HEADS, DIM = 8, 3, 4


def make(lengths: list[int], pool: PinnedPool | None, dtype: torch.dtype = torch.float32) -> KVStore:
    store = KVStore(
        layers=[0, 2], sequences=len(lengths), kv_heads=HEADS, head_dim=DIM, dtype=dtype, device=CPU, pool=pool,
        segment_tokens=SEGMENT, max_tokens=max(lengths) + 20,
    )  # fmt: skip
    for number, length in enumerate(lengths):
        store.reserve(number, length)
    return store


@pytest.mark.parametrize("location", ["host", "gpu"])
@pytest.mark.parametrize("length", [1, 2, SEGMENT - 1, SEGMENT, SEGMENT + 1, 3 * SEGMENT + 5])
def test_round_trip_of_a_prompt_and_appended_tokens(length: int, location: str) -> None:
    with PinnedPool(CPU) as pool:
        store = make([length, 5], pool if location == "host" else None)
        rows = torch.randn(2, HEADS, length + 10, 2, DIM, generator=torch.Generator().manual_seed(length))
        store.write_prompt(2, 0, 0, rows[0, :, :length])
        store.write_prompt(2, 1, 0, rows[1, :, :5])
        lengths = [length, 5]
        for step in range(10):
            for number in range(2):
                store.reserve(number, lengths[number] + step + 1)
            at = torch.tensor(lengths) + step
            new = torch.stack([rows[n, :, int(at[n]) % (length + 10)] for n in range(2)])
            store.append(2, at, new)
            store.append(0, at, torch.full_like(new, step))
        tokens = torch.arange(length + 10).expand(2, HEADS, -1).clone()
        tokens[1, :, 5:] = -1
        out = torch.full((2, HEADS, length + 10, 2, DIM), torch.nan)
        store.gather(2, tokens, tokens.clamp(min=0), out)
        assert torch.equal(out[0], rows[0])
        store.gather(0, tokens, tokens.clamp(min=0), out)
        assert [float(out[0, 0, length + step, 0, 0]) for step in range(10)] == list(range(10))
        store.gather(2, tokens, tokens.clamp(min=0), out)
        assert torch.equal(out[1, :, :5], rows[1, :, :5])
        assert out[1, :, 5:].isnan().all()


@pytest.mark.parametrize("location", ["host", "gpu"])
@pytest.mark.parametrize(("start", "stop"), [(0, 1), (0, 29), (3, 16), (8, 9), (7, 29), (28, 29)])
def test_rows_are_read_back_from_anywhere(start: int, stop: int, location: str) -> None:
    with PinnedPool(CPU) as pool:
        store = make([4, 29], pool if location == "host" else None)
        rows = torch.randn(HEADS, 29, 2, DIM, generator=torch.Generator().manual_seed(stop))
        store.write_prompt(2, 1, 0, rows)
        out = torch.full((HEADS, stop - start, 2, DIM), torch.nan)
        store.read(2, 1, start, out)
        assert torch.equal(out, rows[:, start:stop])
        parts = list(store.parts(2, 1, start, stop))
        assert all(part.is_contiguous() for part in parts)
        assert torch.equal(torch.cat(parts), rows[:, start:stop].flatten(0, 1))
        assert store.prompt_shape(stop) == (HEADS, stop, 2, DIM)


class LayerByLayer(PinnedPool):
    """Says which parts of which blocks are asked for, and has them ready up to `ready` bytes of each."""

    ready = 0

    def __init__(self) -> None:
        super().__init__(CPU)
        self.begun: list[int] = []
        self.waited: list[int | None] = []

    def begin(
        self, nbytes: int, *, blocks: int = 1, grain: int | None = None, part: int | None = None
    ) -> list[torch.Tensor]:
        head = SEGMENT * 2 * DIM * 4
        assert (nbytes, grain, part) == (2 * HEADS * head, head, HEADS * head)
        self.begun.append(blocks)
        return super().begin(nbytes, blocks=blocks, grain=grain, part=part)

    @property
    def busy(self) -> bool:
        return True

    def is_ready(self, block: torch.Tensor, nbytes: int) -> bool:
        return nbytes <= self.ready

    def wait(self, block: torch.Tensor, nbytes: int | None = None) -> None:
        self.waited.append(nbytes)


def test_segments_are_begun_together_and_waited_for_layer_by_layer() -> None:
    layer = HEADS * SEGMENT * 2 * DIM * 4
    with LayerByLayer() as pool:
        store = make([30, 1], pool)
        assert pool.begun == [4, 1] and pool.waited == [None] * 5
        store.prepare(0, 6 * SEGMENT)
        store.prepare(0, 6 * SEGMENT - 3)
        assert pool.begun == [4, 1, 2] and len(pool.waited) == 5
        assert not store.has_room(0, 1, 0)
        pool.ready = layer
        assert store.has_room(0, 6 * SEGMENT, 0) and not store.has_room(0, 1, 2)
        assert not store.has_room(0, 6 * SEGMENT + 1, 0)
        pool.ready = 2 * layer
        assert store.has_room(0, 6 * SEGMENT, 2)
        pool.waited.clear()
        store.reserve(0, 6 * SEGMENT, layer=0, start=4 * SEGMENT)
        assert pool.waited == [layer] * 2
        store.reserve(0, 2 * SEGMENT + 1, layer=2, start=2 * SEGMENT - 1)
        assert pool.waited[2:] == [2 * layer] * 2
        store.reserve(0, 6 * SEGMENT)
        assert pool.waited[4:] == [None] * 6 and pool.begun == [4, 1, 2]
    on_device = make([3], None)
    on_device.prepare(0, 3 * SEGMENT)
    assert on_device.has_room(0, 3 * SEGMENT, 2) and not on_device.has_room(0, 3 * SEGMENT + 1, 2)


def test_segments_that_turn_pageable_lose_their_address() -> None:
    class Refused(PinnedPool):
        turned: tuple[int, ...] = ()
        asked = 0

        @property
        def refusals(self) -> int:
            return len(self.turned)

        def left_pageable(self, block: torch.Tensor) -> bool:
            self.asked += 1
            return block.data_ptr() in self.turned

    with Refused(CPU) as pool:
        store = make([29], pool)
        rows = torch.randn(HEADS, 29, 2, DIM)
        store.write_prompt(0, 0, 0, rows)
        pool.turned = tuple(store.table.addresses[0, 1:3].tolist())
        assert not store.staged
        store.reserve(0, 29, layer=2)
        assert store.staged
        asked = pool.asked
        store.reserve(0, 29)
        assert pool.asked == asked, "every segment is looked at once a refusal"
        assert [bool(address) for address in store.table.addresses[0, :4]] == [True, False, False, True]
        store.write_prompt(2, 0, 0, rows * 2)
        out = torch.empty(1, HEADS, 29, 2, DIM)
        tokens = torch.arange(29).expand(1, HEADS, -1)
        for layer, expected in ((0, rows), (2, rows * 2)):
            store.gather(layer, tokens, tokens, out)
            assert torch.equal(out[0], expected)
        store.close()


@pytest.mark.parametrize("taken", range(17))
def test_rows_survive_a_refusal_between_two_layers(taken: int, driver: FakeDriver) -> None:
    """Two pages a layer, two layers and four segments; the driver takes so many pages."""
    driver.refuses = lambda size, held: held + size > taken * PAGE
    tokens = 2 * PAGE // (2 * DIM * 4)
    length = 4 * tokens - 5
    with PinnedPool(torch.device("cuda", 0), "said once") as pool:
        store = KVStore(
            layers=[0, 1], sequences=1, kv_heads=1, head_dim=DIM, dtype=torch.float32, device=CPU, pool=pool,
            segment_tokens=tokens, max_tokens=length,
        )  # fmt: skip
        rows = torch.randn(2, 1, length, 2, DIM)
        store.prepare(0, length)
        for layer in range(2):
            store.reserve(0, length, layer)
            store.write_prompt(layer, 0, 0, rows[layer])
        store.reserve(0, length)
        whole = taken // 4
        assert pool.pinned_bytes == sum(driver.registered.values()) == whole * 4 * PAGE
        known = [bool(address) for address in store.table.addresses[0, :4]]
        assert known == [True] * whole + [False] * (4 - whole) and store.staged == (whole < 4)
        for layer in range(2):
            assert torch.equal(torch.cat(list(store.parts(layer, 0, 0, length))), rows[layer, 0])
        store.close()


def test_a_prompt_written_in_pieces_equals_one_written_at_once() -> None:
    with PinnedPool(CPU) as pool:
        rows = torch.randn(HEADS, 29, 2, DIM)
        store = make([29], pool)
        for start, end in ((0, 3), (3, 16), (16, 29)):
            store.write_prompt(0, 0, start, rows[:, start:end])
        tokens = torch.arange(29).expand(1, HEADS, -1)
        out = torch.full((1, HEADS, 29, 2, DIM), torch.nan)
        store.gather(0, tokens, tokens, out)
        assert torch.equal(out[0], rows)


def test_unequal_lengths_waste_less_than_a_segment_each() -> None:
    lengths = [1, 100, 17]
    with PinnedPool(CPU) as pool:
        store = make(lengths, pool)
        per_token = 2 * HEADS * store.row_bytes
        assert store.nbytes == sum(-(-n // SEGMENT) * SEGMENT for n in lengths) * per_token
        assert pool.nbytes >= store.nbytes
        assert pool.pinned_bytes == 0


def test_rows_are_stored_in_the_stores_dtype() -> None:
    with PinnedPool(CPU) as pool:
        store = make([4], pool, torch.bfloat16)
        rows = torch.randn(HEADS, 4, 2, DIM)
        store.write_prompt(0, 0, 0, rows)
        assert torch.equal(store.rows(0, 0, 4), rows.bfloat16())


def test_the_pool_forgets_its_blocks_when_closed() -> None:
    with PinnedPool(CPU) as pool:
        block = pool.allocate(10_000)
        assert block.shape == (10_000,) and pool.nbytes >= 10_000
        assert not block.any()
    assert pool.nbytes == 0


@pytest.mark.parametrize("location", ["host", "gpu"])
@pytest.mark.parametrize("length", [1, SEGMENT - 1, SEGMENT, 3 * SEGMENT + 5])
def test_stores_that_share_segments_write_their_own(location: str, length: int) -> None:
    with PinnedPool(CPU) as pool, PinnedPool(CPU) as other_pool:
        pools = (pool, other_pool) if location == "host" else (None, None)
        first = make([length], pools[0])
        rows = torch.randn(HEADS, length, 2, DIM, generator=torch.Generator().manual_seed(length))
        first.write_prompt(2, 0, 0, rows)
        second = KVStore(
            layers=[0, 2], sequences=1, kv_heads=HEADS, head_dim=DIM, dtype=torch.float32, device=CPU, pool=pools[1],
            segment_tokens=SEGMENT, max_tokens=length + 20,
        )  # fmt: skip
        second.share(first, 0, length)
        whole = length // SEGMENT
        same = [
            a.data_ptr() == b.data_ptr() for a, b in zip(*(s.table.tensors[0] for s in (first, second)), strict=True)
        ]
        assert same == [True] * whole + [False] * (length % SEGMENT > 0)
        assert first.shared_bytes(length) == sum(segment.nbytes for segment in first.table.tensors[0][:whole])
        out = torch.empty_like(rows)
        for store, other in ((second, first), (first, second)):
            assert store.shares(0, 0) == (whole > 0) and not store.shares(0, whole * SEGMENT)
            store.unshare(0, SEGMENT)
            assert store.shares(0, 0) == (whole > 0) and not store.shares(0, SEGMENT)
            store.unshare(0, 0)
            assert [int(a) for a in store.table.addresses[0, : whole + 1]][:whole] == [
                segment.data_ptr() for segment in store.table.tensors[0][:whole]
            ]
            store.write_prompt(2, 0, 0, torch.zeros_like(rows))
            if other is first:
                other.read(2, 0, 0, out)
                assert torch.equal(out, rows)
        second.read(2, 0, 0, out)
        assert not out.any()


def test_a_segments_own_copy_is_waited_for() -> None:
    with LayerByLayer() as pool, LayerByLayer() as other_pool:
        first = make([29], pool)
        second = make([0], other_pool)
        second.share(first, 0, 2 * SEGMENT)
        assert other_pool.begun == [] and other_pool.waited == []
        second.unshare(0, SEGMENT)
        assert other_pool.begun == [1] and other_pool.waited == [None]
        assert second.shares(0, SEGMENT - 1) and not second.shares(0, SEGMENT)
