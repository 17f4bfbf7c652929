"""Slots that are emptied, and what later admissions make of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from admit_case import CPU, same_result, same_state, scalar

from ds_offload.kernels.admit import admit_tokens, admit_tokens_reference
from ds_offload.kernels.admit_state import AdmitResult, AdmitState


def test_a_cleared_state_is_an_empty_one() -> None:
    state = AdmitState.empty(1, 2, 4, 9, CPU)
    admit_tokens(state, torch.tensor([[[0, 1, 2], [5, 6, -1]]]), *[scalar(1)] * 2)
    state.clear()
    assert same_state(state, AdmitState.empty(1, 2, 4, 9, CPU))


@pytest.mark.parametrize("admit", [admit_tokens, admit_tokens_reference])
def test_stamps_go_on_behind_a_clearing(admit: Callable[..., AdmitResult]) -> None:
    """The next list counts stamps from there: a count from 0 takes as long as there were admissions."""
    late = 2_000_000_000
    fresh, cleared = (AdmitState.empty(1, 2, 40, 90, CPU) for _ in range(2))
    cleared.clear(scalar(late))
    generator = torch.Generator().manual_seed(0)
    for clock in range(1, 30):
        tokens = torch.rand(1, 2, 90, generator=generator).topk(13).indices.sort().values
        expected = admit(fresh, tokens, scalar(clock), scalar(clock - 1))
        result = admit(cleared, tokens, scalar(late + clock), scalar(late + clock - 1))
        assert same_result(result, expected)
    assert torch.equal(cleared.marks[..., 3] - late, fresh.marks[..., 3])
