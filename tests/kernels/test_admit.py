"""Admissions: the least recently selected leave, hits stay, and every path agrees bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import pytest
import torch

from ds_offload.kernels import admit_cpu
from ds_offload.kernels.admit import admit_launch, admit_tokens, admit_tokens_reference
from ds_offload.kernels.admit_state import EMPTY, AdmitResult, AdmitState

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
        self.arrived = [0] * capacity

    def admit(self, tokens: list[int], clock: int, began: int) -> tuple[list[int], list[int], int, int]:
        wanted = [token for token in tokens if token >= 0]
        slot_of = {token: slot for slot, token in enumerate(self.held) if token in wanted}
        missing = [token for token in wanted if token not in slot_of]
        old = sum(self.arrived[slot] < began for slot in slot_of.values())
        for slot in slot_of.values():
            self.selected[slot] = clock
        idle = [slot for slot in self.order() if self.held[slot] not in slot_of]
        for token, slot in zip(missing, idle, strict=False):
            slot_of[token] = slot
            self.held[slot], self.selected[slot], self.arrived[slot] = token, clock, clock
        padding = len(tokens) - len(wanted)
        moved = [-1 if token not in missing else token for token in wanted] + [-1] * padding
        return [slot_of[token] for token in wanted] + [0] * padding, moved, len(missing), old

    def order(self) -> list[int]:
        return sorted(range(len(self.held)), key=lambda slot: (self.selected[slot], slot))

    def state(self) -> list[list[int]]:
        entries = sorted((token, slot) for slot, token in enumerate(self.held) if token is not None)
        padding = len(self.held) - len(entries)
        tokens, slots = [token for token, _ in entries], [slot for _, slot in entries]
        return [tokens + [EMPTY] * padding, slots + [-1] * padding, self.order(), self.selected, self.arrived]


def equal(ours: Any, theirs: Any) -> bool:
    """Whether two states or two results are the same, bit for bit."""
    pairs = [(getattr(ours, field.name), getattr(theirs, field.name)) for field in fields(ours)]
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """New tensors hold a number that is no slot and no token."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(-77))


def scalar(value: int, device: str = "cpu") -> torch.Tensor:
    return torch.tensor(value, dtype=torch.int32, device=device)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("admit", [admit_tokens, admit_tokens_reference])
@pytest.mark.parametrize("per_step", [1, 2])
@pytest.mark.parametrize(("batch", "heads", "capacity", "kept", "context"), SHAPES)
def test_slots_follow_a_plain_model(
    admit: Callable[..., AdmitResult], per_step: int, batch: int, heads: int, capacity: int, kept: int, context: int
) -> None:
    state = AdmitState.empty(batch, heads, capacity, torch.device("cpu"))
    rows = [PlainRow(capacity) for _ in range(batch * heads)]
    clock, began = scalar(0), scalar(0)
    moved = old = 0
    for number, tokens in enumerate(selections(60, batch, heads, kept, context)):
        if number % per_step == 0:
            began.copy_(clock + 1)
        clock += 1
        before = tokens.clone()
        result = admit(state, tokens, clock, began)
        assert torch.equal(tokens, before)
        flat = tokens.view(batch * heads, kept).tolist()
        expected = [row.admit(chosen, int(clock), int(began)) for row, chosen in zip(rows, flat, strict=True)]
        slots, missing, misses, olds = (torch.tensor(values) for values in zip(*expected, strict=True))
        assert torch.equal(result.slots, slots.view(batch, heads, kept))
        assert torch.equal(result.missing, missing.view(batch, heads, kept))
        assert torch.equal(result.moved, misses.view(batch, heads).int())
        assert torch.equal(result.old, olds.view(batch, heads).int())
        tables = torch.tensor([row.state() for row in rows], dtype=torch.int32).view(batch, heads, 5, capacity)
        assert equal(state, AdmitState(*tables.unbind(2)))
        for chosen, places in zip(flat, result.slots.view(batch * heads, kept).tolist(), strict=True):
            used = [slot for slot, token in zip(places, chosen, strict=True) if token >= 0]
            assert len(set(used)) == len(used)
        moved += int(result.moved.sum())
        old += int(result.old.sum())
    assert moved > 0 and old > 0


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("threads", [1, 2])
def test_the_cpu_leaves_what_the_reference_leaves(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admit_cpu, "SLOTS_PER_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    state, expected = (AdmitState.empty(2, 3, 700, torch.device("cpu")) for _ in range(2))
    for number, tokens in enumerate(selections(20, 2, 3, 500, 2000)):
        args = tokens, scalar(number + 1), scalar(number - number % 2 + 1)
        assert equal(admit_tokens(state, *args), admit_tokens_reference(expected, *args))
        assert equal(state, expected)


@pytest.mark.parametrize("admit", [admit_tokens, admit_tokens_reference])
def test_rows_of_a_larger_tensor(admit: Callable[..., AdmitResult]) -> None:
    state, expected = (AdmitState.empty(2, 2, 8, torch.device("cpu")) for _ in range(2))
    wide = torch.arange(2 * 2 * 10).view(2, 2, 10)
    result = admit(state, wide[..., 1:7:2], scalar(1), scalar(1))
    assert equal(result, admit(expected, wide[..., 1:7:2].contiguous(), scalar(1), scalar(1)))
    assert equal(state, expected)


@pytest.mark.parametrize("admit", [admit_tokens, admit_tokens_reference])
@pytest.mark.parametrize("shape", [(1, 2, 0), (0, 2, 3), (2, 0, 3)])
def test_nothing_to_admit(admit: Callable[..., AdmitResult], shape: tuple[int, int, int]) -> None:
    state = AdmitState.empty(shape[0], shape[1], 4, torch.device("cpu"))
    result = admit(state, torch.empty(shape, dtype=torch.int64), scalar(1), scalar(1))
    assert result.slots.shape == result.missing.shape == shape
    assert result.moved.tolist() == result.old.tolist() == torch.zeros(shape[:2]).tolist()
    assert equal(state, AdmitState.empty(shape[0], shape[1], 4, torch.device("cpu")))


@pytest.mark.parametrize("admit", [admit_tokens, admit_tokens_reference])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": torch.zeros(1, 2, 3, dtype=torch.int32)}, r"tokens .* must be int64 \[1, 2, K\]"),
        ({"tokens": torch.zeros(1, 3, 3, dtype=torch.int64)}, r"tokens .* must be int64 \[1, 2, K\]"),
        ({"tokens": torch.arange(5).expand(1, 2, 5)}, "5 tokens a row need as many slots; the state has 4"),
        ({"tokens": torch.tensor([[[0, 1, 2], [5, 4, -1]]])}, "row 1 of tokens must be below"),
        ({"tokens": torch.tensor([[[3, 3, -1], [1, 2, 3]]])}, "row 0 of tokens must be below"),
        ({"tokens": torch.tensor([[[0, 1, 2], [3, -1, 4]]])}, "row 1 of tokens must be below"),
        ({"tokens": torch.tensor([[[0, 1, EMPTY], [3, 4, 5]]])}, "row 0 of tokens must be below 2147483647"),
        ({"clock": torch.tensor(1)}, "clock torch.int64 .* must be an int32 scalar"),
        ({"began": torch.ones(1, dtype=torch.int32)}, "began .* must be an int32 scalar"),
        ({"state": AdmitState(*[torch.zeros(1, 2, 4)] * 5)}, "state.tokens torch.float32"),
        ({"state": AdmitState(*[torch.zeros(1, 4, 2, dtype=torch.int32).mT] * 5)}, "contiguous"),
    ],
)
def test_wrong_arguments_are_named(admit: Callable[..., AdmitResult], change: dict, message: str) -> None:
    arguments = {
        "state": AdmitState.empty(1, 2, 4, torch.device("cpu")),
        "tokens": torch.tensor([[[0, 1, 2], [5, 6, -1]]]),
        "clock": scalar(1),
        "began": scalar(1),
    }
    with pytest.raises(ValueError, match=message):
        admit(**(arguments | change))
    assert equal(arguments["state"], AdmitState.empty(1, 2, 4, torch.device("cpu")))
    admit(**arguments)


@pytest.mark.parametrize("capacity", [1, 96, 512, 1024, 7500, 16384, 10**6])
def test_launch_fits_the_kernel(capacity: int) -> None:
    launch = admit_launch(capacity)
    for value in (launch.tile, launch.warps):
        assert value & (value - 1) == 0
    # The kernel packs two counts of a tile into one number.
    assert launch.tile < 2**15 and 1 <= launch.warps <= 32


def test_triton_kernel_in_the_interpreter(interpret: Callable[[str], None]) -> None:
    interpret("interpreted_admit.py")


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    ("batch", "heads", "capacity", "kept", "context"), [*SHAPES, (4, 8, 7500, 3750, 60000), (1, 3, 16384, 8192, 100000)]
)
def test_cuda(batch: int, heads: int, capacity: int, kept: int, context: int) -> None:
    state, expected = (AdmitState.empty(batch, heads, capacity, torch.device("cuda")) for _ in range(2))
    clock, began = scalar(0, "cuda"), scalar(0, "cuda")
    for number, tokens in enumerate(selections(50, batch, heads, kept, context)):
        clock += 1
        if number % 2 == 0:
            began.copy_(clock)
        on_device = tokens.cuda()
        torch.cuda.set_sync_debug_mode("error")
        try:
            result = admit_tokens(state, on_device, clock, began)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert equal(result, admit_tokens_reference(expected, on_device, clock, began))
        assert equal(state, expected)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_memory")
def test_cuda_stays_within_its_row_where_tokens_do_not_ascend() -> None:
    state, expected = (AdmitState.empty(1, 3, 500, torch.device("cuda")) for _ in range(2))
    for number, tokens in enumerate(selections(10, 1, 3, 400, 900)):
        args = scalar(number + 1, "cuda"), scalar(1, "cuda")
        tokens = tokens.cuda()
        expected_result = admit_tokens_reference(expected, tokens, *args)
        tokens[:, 1] = tokens[:, 1].flip(-1) // 2
        result = admit_tokens(state, tokens, *args)
        for row in (0, 2):
            for ours, theirs in ((state, expected), (result, expected_result)):
                for field in fields(ours):
                    assert torch.equal(getattr(ours, field.name)[:, row], getattr(theirs, field.name)[:, row])
    assert int(result.slots.min()) >= 0 and int(result.slots.max()) < 500


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_memory")
def test_cuda_graph_admits_the_tokens_it_is_replayed_with() -> None:
    state, expected = (AdmitState.empty(2, 4, 3000, torch.device("cuda")) for _ in range(2))
    tokens = torch.full((2, 4, 1500), -1, device="cuda")
    clock, began = scalar(0, "cuda"), scalar(1, "cuda")

    def step() -> AdmitResult:
        clock.add_(1)
        return admit_tokens(state, tokens, clock, began)

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
            began.copy_(clock + 1)
        graph.replay()
        assert int(clock) == number + 2
        assert equal(result, admit_tokens_reference(expected, tokens, clock, began))
        assert equal(state, expected)
