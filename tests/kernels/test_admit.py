"""Admissions: the least recently selected leave, hits stay, and every path agrees bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, replace

import pytest
import torch
from admit_case import CPU, same_result, same_state, scalar

from ds_offload.kernels import admit_cpu
from ds_offload.kernels.admit import admit_launch, admit_tokens, admit_tokens_reference
from ds_offload.kernels.admit_state import AdmitResult, AdmitState

# Sequences, KV heads, slots, tokens, context.
SHAPES = [
    (2, 3, 12, 5, 30),
    (1, 1, 1, 1, 3),
    (1, 2, 7, 7, 15),
    (1, 2, 33, 16, 40),
    (2, 1, 64, 32, 500),
    (1, 1, 9, 3, 9),
]


def selections(count: int, batch: int, heads: int, kept: int, context: int, seed: int = 0) -> Iterator[torch.Tensor]:
    """Sets of tokens that change slowly; some padded, every fifth the one before again."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.zeros(batch, heads, context)
    tokens = torch.empty(0)
    for number in range(count):
        if number % 5 != 4:
            scores = 0.8 * scores + torch.randn(scores.shape, generator=generator)
            lengths = torch.randint(0, 2 * kept + 1, (batch, heads, 1), generator=generator)
            tokens = scores.topk(kept).indices.sort().values.masked_fill(torch.arange(kept) >= lengths, -1)
        yield tokens


class PlainRow:
    """One row's slots as plain lists."""

    def __init__(self, capacity: int) -> None:
        self.held: list[int | None] = [None] * capacity
        self.selected = [0] * capacity
        self.queue: list[int] = []
        self.listed_at = 0

    def admit(self, tokens: list[int], clock: int, recent: int) -> tuple[list[int], list[int], list[int], list[int]]:
        """Places from 100 on, what is missing, where to, and the four counts."""
        wanted = [token for token in tokens if token >= 0]
        slot_of = {token: slot for slot, token in enumerate(self.held) if token in wanted}
        missing = [token for token in wanted if token not in slot_of]
        old = len(slot_of)
        again = sum(self.selected[slot] >= recent for slot in slot_of.values())
        for slot in slot_of.values():
            self.selected[slot] = clock
        if sum(self.selected[slot] < self.listed_at for slot in self.queue) < len(missing):
            idle = [slot for slot in range(len(self.held)) if self.held[slot] not in slot_of]
            by_stamp = sorted(idle, key=lambda slot: (self.selected[slot], slot))
            self.queue = by_stamp[: max(len(missing), len(self.held) // 8, 1)]
            highest = self.selected[self.queue[-1]]
            self.queue.sort(key=lambda slot: (self.selected[slot] == highest, slot))
            self.listed_at = clock
        victims: list[int] = []
        while len(victims) < len(missing):
            slot = self.queue.pop(0)
            if self.selected[slot] < self.listed_at:
                victims.append(slot)
        for token, slot in zip(missing, victims, strict=True):
            slot_of[token] = slot
            self.held[slot], self.selected[slot] = token, clock
        places = [100 + slot_of[token] if token >= 0 else -1 for token in tokens]
        return places, missing, [100 + slot for slot in victims], [len(missing), len(wanted), old, again]

    def state(self, context: int) -> list[list[int]]:
        page = [self.held.index(token) if token in self.held else -1 for token in range(context)]
        held = [-1 if token is None else token for token in self.held]
        return [page, held, self.selected]


def wrong_state(**changes: torch.Tensor) -> AdmitState:
    return replace(AdmitState.empty(1, 2, 4, 9, CPU), **changes)


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """New tensors hold a number that is no slot and no token."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(-77))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("admit", [admit_tokens, admit_tokens_reference])
@pytest.mark.parametrize("per_step", [1, 2])
@pytest.mark.parametrize(("batch", "heads", "capacity", "kept", "context"), SHAPES)
def test_slots_follow_a_plain_model(
    admit: Callable[..., AdmitResult], per_step: int, batch: int, heads: int, capacity: int, kept: int, context: int
) -> None:
    state = AdmitState.empty(batch, heads, capacity, context, CPU)
    rows = [PlainRow(capacity) for _ in range(batch * heads)]
    clock = scalar(0)
    counts, expected_counts = torch.zeros(batch, heads, 4, dtype=torch.int64), [[0] * 4 for _ in rows]
    for number, tokens in enumerate(selections(60, batch, heads, kept, context)):
        attended = number % per_step == per_step - 1
        clock += 1
        before = tokens.clone()
        recent = clock - 3
        result = admit(state, tokens, clock, recent, first_place=100, counts=counts, attended=attended)
        assert torch.equal(tokens, before)
        for n, row in enumerate(rows):
            b, h = divmod(n, heads)
            places, missing, targets, gained = row.admit(tokens[b, h].tolist(), int(clock), int(recent))
            assert result.places[b, h].tolist() == places
            assert int(result.moved[b, h]) == len(missing)
            assert result.missing[b, h, : len(missing)].tolist() == missing
            assert result.missing_places[b, h, : len(missing)].tolist() == targets
            for value, plain in zip((state.page, state.tokens, state.selected), row.state(context), strict=True):
                assert value[b, h].tolist() == plain
            taken, listed, listed_at, _ = state.marks[b, h].tolist()
            assert (state.queue[b, h, taken:listed].tolist(), listed_at) == (row.queue, row.listed_at)
            counted = gained if attended else [gained[0], 0, 0, 0]
            expected_counts[n] = [a + g for a, g in zip(expected_counts[n], counted, strict=True)]
    assert counts.flatten(0, 1).tolist() == expected_counts
    assert all(total > 0 for total in counts.sum((0, 1))[: 4 if per_step == 2 else 3])


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("capacity", [700, 40_000])
def test_the_cpu_leaves_what_the_reference_leaves(threads: int, capacity: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admit_cpu, "SLOTS_PER_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    state, expected = (AdmitState.empty(2, 3, capacity, 2000, CPU) for _ in range(2))
    assert state.page.dtype == (torch.int16 if capacity == 700 else torch.int32)
    for number, tokens in enumerate(selections(20, 2, 3, 500, 2000)):
        args = tokens, scalar(number + 1), scalar(number)
        assert same_result(admit_tokens(state, *args), admit_tokens_reference(expected, *args))
        assert same_state(state, expected)


@pytest.mark.parametrize("admit", [admit_tokens, admit_tokens_reference])
def test_rows_of_larger_tensors(admit: Callable[..., AdmitResult]) -> None:
    state, expected = (AdmitState.empty(2, 2, 8, 10, CPU) for _ in range(2))
    wide = torch.arange(2 * 2 * 10).view(2, 2, 10) % 10
    places = torch.full((2, 2, 7), -5)
    result = admit(state, wide[..., 1:7:2], *[scalar(1)] * 2, places=places[..., 2:5])
    assert same_result(result, admit(expected, wide[..., 1:7:2].contiguous(), *[scalar(1)] * 2))
    assert same_state(state, expected)
    assert (places[..., :2] == -5).all() and (places[..., 5:] == -5).all() and (places[..., 2:5] >= 0).all()


@pytest.mark.parametrize("admit", [admit_tokens, admit_tokens_reference])
@pytest.mark.parametrize("shape", [(1, 2, 0), (0, 2, 3), (2, 0, 3)])
def test_nothing_to_admit(admit: Callable[..., AdmitResult], shape: tuple[int, int, int]) -> None:
    state = AdmitState.empty(shape[0], shape[1], 4, 9, CPU)
    result = admit(state, torch.empty(shape, dtype=torch.int64), *[scalar(1)] * 2)
    assert result.places.shape == result.missing.shape == shape
    assert result.moved.tolist() == torch.zeros(shape[:2]).tolist()
    assert same_state(state, AdmitState.empty(shape[0], shape[1], 4, 9, CPU))


@pytest.mark.parametrize("admit", [admit_tokens, admit_tokens_reference])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": torch.zeros(1, 2, 3, dtype=torch.int32)}, r"tokens .* must be int64 \[1, 2, K\]"),
        ({"tokens": torch.zeros(1, 3, 3, dtype=torch.int64)}, r"tokens .* must be int64 \[1, 2, K\]"),
        ({"tokens": torch.arange(5).expand(1, 2, 5)}, "5 tokens a row need as many slots; the state has 4"),
        ({"tokens": torch.tensor([[[0, 1, 2], [5, 9, -1]]])}, "token 9 is beyond the state's context of 9 tokens"),
        ({"clock": torch.tensor(1)}, "clock torch.int64 .* must be an int32 scalar"),
        ({"recent": torch.ones(1, dtype=torch.int32)}, "recent .* must be an int32 scalar"),
        ({"places": torch.zeros(1, 2, 3)}, "places torch.float32"),
        ({"places": torch.zeros(1, 2, 6, dtype=torch.int64)[..., ::2]}, "places .* its rows contiguous"),
        ({"counts": torch.zeros(1, 2, 3, dtype=torch.int64)}, r"counts .* must be int64 \(1, 2, 4\)"),
        ({"state": wrong_state(tokens=torch.zeros(1, 2, 4))}, "state.tokens torch.float32"),
        ({"state": wrong_state(page=torch.zeros(1, 2, 9, dtype=torch.int32))}, "state.page torch.int32"),
        ({"state": wrong_state(selected=torch.zeros(1, 4, 2, dtype=torch.int32).mT)}, "contiguous"),
    ],
)
def test_wrong_arguments_are_named(admit: Callable[..., AdmitResult], change: dict, message: str) -> None:
    arguments = {
        "state": AdmitState.empty(1, 2, 4, 9, CPU),
        "tokens": torch.tensor([[[0, 1, 2], [5, 6, -1]]]),
        "clock": scalar(1),
        "recent": scalar(1),
    }
    with pytest.raises(ValueError, match=message):
        admit(**(arguments | change))
    assert same_state(arguments["state"], AdmitState.empty(1, 2, 4, 9, CPU))
    admit(**arguments)


@pytest.mark.parametrize("kept", [0, 1, 96, 512, 1024, 7500, 16384, 10**6])
def test_launch_fits_the_kernels(kept: int) -> None:
    launch = admit_launch(kept)
    for value in (launch.part, launch.tile, launch.list_tile, launch.bins, launch.warps):
        assert value > 0 and value & (value - 1) == 0
    # The kernel packs two counts of a tile into one number.
    assert launch.list_tile < 2**15


def test_triton_kernel_in_the_interpreter(interpret: Callable[[str], None]) -> None:
    interpret("interpreted_admit.py")


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    ("batch", "heads", "capacity", "kept", "context"), [*SHAPES, (2, 4, 7500, 3750, 60000), (1, 2, 40000, 8192, 100000)]
)
def test_cuda(batch: int, heads: int, capacity: int, kept: int, context: int) -> None:
    state = AdmitState.empty(batch, heads, capacity, context, torch.device("cuda"))
    expected = AdmitState.empty(batch, heads, capacity, context, CPU)
    counts, expected_counts = (torch.zeros(batch, heads, 4, dtype=torch.int64, device=d) for d in ("cuda", "cpu"))
    places = torch.zeros(batch, heads, kept + 5, dtype=torch.int64, device="cuda")
    for number, tokens in enumerate(selections(30, batch, heads, kept, context)):
        stamps = number + 1, number
        on_device = tokens.cuda(), *(scalar(n, "cuda") for n in stamps)
        torch.cuda.set_sync_debug_mode("error")
        try:
            result = admit_tokens(state, *on_device, first_place=5, places=places[..., 5:], counts=counts)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        theirs = admit_tokens(expected, tokens, *(scalar(n) for n in stamps), first_place=5, counts=expected_counts)
        assert same_result(AdmitResult(*(getattr(result, field.name).cpu() for field in fields(result))), theirs)
        assert same_state(on_cpu(state), expected)
    assert torch.equal(counts.cpu(), expected_counts)


def on_cpu(state: AdmitState) -> AdmitState:
    return AdmitState(*(getattr(state, field.name).cpu() for field in fields(state)))


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_memory")
def test_cuda_graph_admits_the_tokens_it_is_replayed_with() -> None:
    state, expected = (AdmitState.empty(2, 4, 3000, 9000, torch.device(d)) for d in ("cuda", "cpu"))
    tokens = torch.full((2, 4, 1500), -1, device="cuda")
    clock, recent = scalar(0, "cuda"), scalar(1, "cuda")

    def step() -> AdmitResult:
        clock.add_(1)
        return admit_tokens(state, tokens, clock, recent)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    for number, chosen in enumerate(selections(20, 2, 4, 1500, 9000)):
        tokens.copy_(chosen)
        if number % 2 == 0:
            recent.copy_(clock + 1)
        graph.replay()
        assert int(clock) == number + 2
        theirs = admit_tokens(expected, chosen, clock.cpu(), recent.cpu())
        assert same_result(AdmitResult(*(getattr(result, field.name).cpu() for field in fields(result))), theirs)
        assert same_state(on_cpu(state), expected)
