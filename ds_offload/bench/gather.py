"""`ds-offload bench gather`: rows from the host store against the link's peak."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import psutil
import torch
from torch import Tensor

from ds_offload.bench.limits import measure_limits
from ds_offload.bench.report import BenchRow
from ds_offload.bench.sizes import check_room, kept_tokens
from ds_offload.bench.timing import Stopwatch, Timing
from ds_offload.config import TokenBudget
from ds_offload.errors import InputError
from ds_offload.kernels.gather import gather_rows
from ds_offload.memory.kv_store import KVStore
from ds_offload.memory.pinned_pool import PinnedPool
from ds_offload.notices import notice

# One selected row in so many is not on the device yet; the last as with a hot set of four times the budget.
MISSING_ONE_IN = (1, 2, 10, 64)
SEGMENT_TOKENS = 1024
# The store has as many layers as fit into this, and into a share of what the host has free, so that calls that follow
# each other read different rows, and so many that the device has forgotten where a row's page is.
STORE_BYTES = 16 << 30
HOST_SHARE = 1 / 4
MOST_LAYERS = 16
DTYPE = torch.bfloat16
ROW_STEP = 4 * DTYPE.itemsize


@dataclass(frozen=True)
class GatherSizes:
    """What is gathered: the budget's rows of `sequences` sequences, `kv_heads` heads and `tokens` tokens.

    Attributes:
        row_bytes: Bytes of K and V of one token of one KV head, one case each.

    Raises:
        InputError: Rows that are no K and V in bf16.
    """

    sequences: int
    kv_heads: int
    tokens: int
    budget: TokenBudget
    row_bytes: tuple[int, ...]

    def __post_init__(self) -> None:
        for size in self.row_bytes:
            if size % ROW_STEP or size < ROW_STEP:
                raise InputError(f"row_bytes={size} must be a multiple of {ROW_STEP}, such as 512")

    @classmethod
    def default(cls, device: torch.device) -> GatherSizes:
        """One sequence of 64K tokens and 32 heads on a GPU, small sizes on a CPU."""
        budget = TokenBudget.parse("1/16")
        if device.type == "cuda":
            return cls(1, 32, 1 << 16, budget, (128, 256, 512, 1024))
        return cls(1, 2, 1 << 12, budget, (128, 512))

    @property
    def kept(self) -> int:
        """Rows of one head that a call gathers at most."""
        return kept_tokens(self.budget, self.tokens)

    def layer_bytes(self, row_bytes: int) -> int:
        """Bytes of one layer of the store, in whole segments."""
        segments = -(-self.tokens // SEGMENT_TOKENS)
        return self.sequences * self.kv_heads * segments * SEGMENT_TOKENS * row_bytes

    def layers(self, row_bytes: int) -> int:
        """Layers of the store that the host has room for now, at least 1."""
        room = min(STORE_BYTES, int(HOST_SHARE * psutil.virtual_memory().available))
        return max(1, min(MOST_LAYERS, room // self.layer_bytes(row_bytes)))


def bench_gather(device: torch.device, sizes: GatherSizes, samples: int) -> list[BenchRow]:
    """Time `gather_rows` of ascending and of shuffled tokens, and a gather on the CPU followed by one copy.

    Where only some rows are missing, the others' entries are -1 among them; "listed in
    front" has those that are missing in front of the list and says how many they are,
    as a decode step does.

    The limit is the time that the gathered rows' bytes take over the link in one copy.

    Raises:
        InputError: A budget that depends on scores, or a store that does not fit the memory.
    """
    # Settled before the stores take memory.
    layers = {row_bytes: sizes.layers(row_bytes) for row_bytes in sizes.row_bytes}
    for row_bytes, count in layers.items():
        lists = sizes.sequences * sizes.kv_heads * sizes.kept * (row_bytes + 2 * 16 * count)
        check_room(device, host=count * sizes.layer_bytes(row_bytes) + lists, gpu=lists)
    watch = Stopwatch(device, samples)
    rows: list[BenchRow] = []
    for row_bytes, count in layers.items():
        with _store(device, sizes, row_bytes, count) as store:
            rows += _cases(sizes, row_bytes, count, store, watch)
    return rows


@contextmanager
def _store(device: torch.device, sizes: GatherSizes, row_bytes: int, layers: int) -> Iterator[KVStore]:
    notice(f"bench gather: {layers * sizes.layer_bytes(row_bytes) / 2**30:.2f} GiB of rows of {row_bytes} bytes")
    with PinnedPool(device, in_place=True) as pool:
        store = KVStore(
            layers=range(layers),
            sequences=sizes.sequences,
            kv_heads=sizes.kv_heads,
            head_dim=row_bytes // (2 * DTYPE.itemsize),
            dtype=DTYPE,
            device=device,
            pool=pool,
            segment_tokens=SEGMENT_TOKENS,
            max_tokens=sizes.tokens,
        )
        try:
            for sequence in range(sizes.sequences):
                store.reserve(sequence, sizes.tokens)
            yield store
        finally:
            # The pool is about to take the memory away.
            store.table.tensors.clear()


def _cases(sizes: GatherSizes, row_bytes: int, layers: int, store: KVStore, watch: Stopwatch) -> Iterator[BenchRow]:
    device = watch.device
    shape = (sizes.sequences, sizes.kv_heads, sizes.kept)
    out = torch.empty(*shape, 2, row_bytes // (2 * DTYPE.itemsize), dtype=DTYPE, device=device)
    slots = torch.arange(sizes.kept, device=device).expand(shape).contiguous()

    def row(name: str, lists: list[Tensor], timing: Timing) -> BenchRow:
        rows = sum(int((tokens >= 0).sum()) for tokens in lists) / len(lists)
        nbytes = rows * row_bytes
        return BenchRow.of(
            f"{row_bytes} B, {name}",
            timing,
            "us",
            measure_limits(device).link_s(nbytes),
            row_bytes=row_bytes,
            rows=round(rows),
            bytes=round(nbytes),
            gb_per_s=nbytes / timing.median / 1e9,
        )

    for one_in in MISSING_ONE_IN:
        lists = [_missing(shape, sizes.tokens, one_in, layer) for layer in range(layers)]
        share = "all" if one_in == 1 else f"1/{one_in}"
        if one_in > 1:
            timing = watch.time(
                [partial(_gather_listed, store, n, one, slots, out) for n, one in _listed(lists, device)]
            )
            yield row(f"{share} missing, ascending, listed in front", lists, timing)
        for order in ("ascending", "shuffled"):
            ordered = lists if order == "ascending" else [_shuffled(tokens) for tokens in lists]
            calls = [partial(store.gather, n, tokens.to(device), slots, out) for n, tokens in enumerate(ordered)]
            yield row(f"{share} missing, {order}", lists, watch.time(calls))
        if one_in == 1:
            baseline = _on_the_cpu(store, lists, out)
            yield row(f"{share} missing, CPU gather and copy", lists, watch.time(baseline, capture=False))


def _missing(shape: tuple[int, ...], tokens: int, one_in: int, seed: int) -> Tensor:
    """Lists `shape` int64 of distinct ascending tokens below `tokens`; all but one in `one_in` are -1."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(*shape[:2], tokens, generator=generator).topk(shape[2], -1).indices.sort(-1).values
    return torch.where(torch.rand(shape, generator=generator) * one_in < 1, chosen, -1)


def _shuffled(tokens: Tensor) -> Tensor:
    order = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(0)).argsort(-1)
    return tokens.gather(-1, order)


def _listed(lists: list[Tensor], device: torch.device) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
    """Each layer's tokens in front of the -1s, as an admission lists them, and how many they are."""
    for layer, tokens in enumerate(lists):
        order = (tokens < 0).byte().argsort(dim=-1, stable=True)
        counts = (tokens >= 0).sum(-1, dtype=torch.int32)
        yield layer, (tokens.gather(-1, order).to(device), counts.to(device))


def _gather_listed(store: KVStore, layer: int, listed: tuple[Tensor, Tensor], slots: Tensor, out: Tensor) -> None:
    store.gather(layer, listed[0], slots, out, listed[1])


def _on_the_cpu(store: KVStore, lists: list[Tensor], out: Tensor) -> list[Callable[[], object]]:
    """The same rows by way of the CPU: lists come to the host, its cores fill a buffer, one copy follows."""
    pinned = out.is_cuda
    table = replace(store.table, addresses=store.table.addresses.cpu())
    buffer = torch.empty(out.shape, dtype=out.dtype, pin_memory=pinned)
    slots = torch.arange(out.shape[2]).expand(out.shape[:3]).contiguous()

    def fetch(layer: int, tokens: Tensor) -> None:
        gather_rows(table, layer, tokens.cpu(), slots, buffer)
        # Waits: the next gather fills the buffer again.
        out.copy_(buffer)

    return [partial(fetch, layer, tokens.to(out.device)) for layer, tokens in enumerate(lists)]
