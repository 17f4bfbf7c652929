"""The Triton kernel of the admission on CPU tensors; run by test_admit.py under TRITON_INTERPRET=1."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from ds_offload.kernels import admit
from ds_offload.kernels.admit import AdmitLaunch, admit_tokens_reference
from ds_offload.kernels.admit_state import AdmitState, result_for

CPU = torch.device("cpu")
TOKENS = torch.tensor([[[7, 8, 9]]])


def scalar(value: int) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.int32)


# One tile; several, the last part empty; all slots selected; a single slot; stamps beyond one range of bins.
@pytest.mark.parametrize(
    ("batch", "heads", "capacity", "kept", "part", "tile", "bins", "slice"),
    [
        (2, 2, 12, 5, 16, 16, 16, 64),
        (1, 2, 12, 5, 2, 8, 4, 64),
        (1, 1, 1, 1, 128, 128, 8, 64),
        (1, 2, 21, 21, 4, 4, 2, 64),
        (1, 2, 33, 16, 8, 8, 2, 64),
        (1, 2, 40, 4, 1, 16, 2, 64),
        (1, 2, 200, 6, 4, 2, 4, 64),
        # More parts than are looked through at a time.
        (2, 2, 40, 21, 2, 8, 4, 4),
        (1, 2, 33, 16, 1, 16, 2, 1),
    ],
)
def test_kernel_equals_the_reference(
    batch: int,
    heads: int,
    capacity: int,
    kept: int,
    part: int,
    tile: int,
    bins: int,
    slice: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(admit, "admit_launch", lambda kept: AdmitLaunch(part, tile, 2 * tile, bins, 1, 1, slice))
    generator = torch.Generator().manual_seed(kept)
    context = 2 * capacity + 1
    state, expected = (AdmitState.empty(batch, heads, capacity, context, CPU) for _ in range(2))
    counts, expected_counts = (torch.zeros(batch, heads, 4, dtype=torch.int64) for _ in range(2))
    for number in range(30):
        if number % 5 != 4:
            chosen = torch.rand(batch, heads, context, generator=generator).topk(kept).indices.sort().values
            lengths = torch.randint(0, 2 * kept + 1, (batch, heads, 1), generator=generator)
            tokens = chosen.masked_fill(torch.arange(kept) >= lengths, -1)
        stamps = scalar(number + 1), scalar(number - 1)
        result = result_for(tokens, torch.full((batch, heads, kept + 3), -9)[..., 3:])
        attended = number % 3 != 0
        admit._launch(state, tokens, *stamps, 7, result, counts, attended)
        theirs = admit_tokens_reference(
            expected, tokens, *stamps, first_place=7, counts=expected_counts, attended=attended
        )
        listed = torch.arange(kept) < theirs.moved[..., None]
        assert torch.equal(result.places, theirs.places) and torch.equal(result.moved, theirs.moved)
        assert torch.equal(result.missing[listed], theirs.missing[listed])
        assert torch.equal(result.missing_places[listed], theirs.missing_places[listed])
        for field in fields(state):
            ours, reference = getattr(state, field.name), getattr(expected, field.name)
            if field.name == "queue":
                left = torch.arange(capacity)
                left = (left >= expected.marks[..., :1]) & (left < expected.marks[..., 1:2])
                ours, reference = ours[left], reference[left]
            assert torch.equal(ours, reference), field.name
    assert torch.equal(counts, expected_counts)


def test_tokens_beyond_the_context_are_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    state = AdmitState.empty(1, 1, 4, 9, CPU)
    tokens = torch.tensor([[[3, 9, 2**40]]])
    result = result_for(tokens, None)
    admit._launch(state, tokens, *[scalar(1)] * 2, 0, result, None, True)
    assert result.places.flatten().tolist() == [0, -1, -1] and result.moved.tolist() == [[1]]


def test_a_stamp_that_was_not_advanced_writes_nothing_out_of_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an admission meets that does not wait for the step's own stamp: too few slots may be taken."""
    # Scratch that holds what is no slot.
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: empty(*shape, **options).fill_(10**6))
    state = AdmitState.empty(1, 1, 4, 20, CPU)
    admit._launch(state, torch.tensor([[[1, 2, 3]]]), *[scalar(5)] * 2, 0, result_for(TOKENS, None), None, True)
    held = state.tokens.clone()
    result = result_for(TOKENS, None)
    admit._launch(state, TOKENS, *[scalar(5)] * 2, 0, result, None, True)
    assert result.places.tolist() == [[[3, -1, -1]]] and result.moved.tolist() == [[1]]
    assert result.missing[0, 0, 0] == 7 and state.tokens.tolist() == [[[*held[0, 0, :3].tolist(), 7]]]


@pytest.mark.parametrize("shape", [(1, 2, 0), (0, 2, 3)])
def test_nothing_to_admit(shape: tuple[int, int, int]) -> None:
    state = AdmitState.empty(shape[0], shape[1], 4, 9, CPU)
    tokens = torch.empty(shape, dtype=torch.int64)
    result = result_for(tokens, None)
    admit._launch(state, tokens, *[scalar(1)] * 2, 0, result, None, True)
    assert result.moved.tolist() == torch.zeros(shape[:2]).tolist()
