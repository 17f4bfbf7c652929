"""The Triton kernel of the admission on CPU tensors; run by test_admit.py under TRITON_INTERPRET=1."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch

from ds_offload.kernels import admit
from ds_offload.kernels.admit import AdmitLaunch, admit_tokens_reference
from ds_offload.kernels.admit_state import EMPTY, AdmitState

CPU = torch.device("cpu")


def scalar(value: int) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.int32)


def equal(ours: Any, theirs: Any) -> bool:
    pairs = [(getattr(ours, field.name), getattr(theirs, field.name)) for field in fields(ours)]
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


# One tile; several, the last part empty; all slots selected; a single slot.
@pytest.mark.parametrize(
    ("batch", "heads", "capacity", "kept", "tile"),
    [(2, 2, 12, 5, 16), (1, 2, 12, 5, 8), (1, 1, 1, 1, 128), (1, 2, 21, 21, 4), (1, 2, 33, 16, 8)],
)
def test_kernel_equals_the_reference(
    batch: int, heads: int, capacity: int, kept: int, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admit, "admit_launch", lambda capacity: AdmitLaunch(tile, 1))
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(-77))
    generator = torch.Generator().manual_seed(kept)
    state, expected = (AdmitState.empty(batch, heads, capacity, CPU) for _ in range(2))
    for number in range(9):
        if number != 7:
            chosen = torch.rand(batch, heads, 2 * capacity + 1, generator=generator).topk(kept).indices.sort().values
            lengths = torch.randint(0, 2 * kept + 1, (batch, heads, 1), generator=generator)
            tokens = chosen.masked_fill(torch.arange(kept) >= lengths, -1)
        args = tokens, scalar(number + 1), scalar(number - number % 2 + 1)
        assert equal(admit._launch(state, *args), admit_tokens_reference(expected, *args))
        assert equal(state, expected)


@pytest.mark.parametrize("shape", [(1, 2, 0), (0, 2, 3)])
def test_nothing_to_admit(shape: tuple[int, int, int]) -> None:
    state = AdmitState.empty(shape[0], shape[1], 4, CPU)
    result = admit._launch(state, torch.empty(shape, dtype=torch.int64), scalar(1), scalar(1))
    assert result.moved.tolist() == result.old.tolist() == torch.zeros(shape[:2]).tolist()
    assert equal(state, AdmitState.empty(shape[0], shape[1], 4, CPU))


def test_tokens_that_do_not_ascend_get_slots_of_their_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admit, "admit_launch", lambda capacity: AdmitLaunch(8, 1))
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(-(10**8)))
    generator = torch.Generator().manual_seed(0)
    state = AdmitState.empty(1, 1, 11, CPU)
    for number in range(12):
        tokens = torch.randint(-1, 25, (1, 1, 11), generator=generator)
        if number % 3 == 0:
            tokens[..., 4] = EMPTY
        result = admit._launch(state, tokens, scalar(number + 1), scalar(1))
        assert result.slots.min() >= 0 and result.slots.max() < 11
        assert state.order.flatten().sort().values.tolist() == list(range(11))
