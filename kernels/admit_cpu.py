"""The CPU's admission: every row's slots looked up and changed in place.

Import this module at first use: it loads Numba.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ds_offload.kernels.admit_state import AdmitResult, AdmitState, listed_slots
from ds_offload.kernels.numba_runtime import compiled, run_split

# About a quarter of a millisecond.
SLOTS_PER_THREAD = 50_000

_SIGNATURE = (
    "void({page}[:,::1], int32[:,::1], int32[:,::1], int32[:,::1], int32[:,::1], int64[:,::1],"
    "UniTuple(int64, 2), int64[:,:], int64[:,::1], int64[:,::1], int32[::1], int64[:,::1], int64, int64, int64, int64)"
)


@compiled("void(int32[::1], int32[::1], int32[::1], int64, int64)")
def _list_slots(selected, queue, marks, length, clock):
    """Fill the queue of a row with the `length` slots of the lowest stamps, those selected now not among them."""
    lowest = selected.min()
    counts = np.zeros(clock + 1 - lowest, np.int64)
    for stamp in selected:
        counts[stamp - lowest] += 1
    below, threshold = 0, lowest
    while below + counts[threshold - lowest] < length:
        below += counts[threshold - lowest]
        threshold += 1
    lower, equal = 0, below
    for slot in range(len(selected)):
        if selected[slot] < threshold:
            queue[lower] = slot
            lower += 1
        elif selected[slot] == threshold and equal < length:
            queue[equal] = slot
            equal += 1
    marks[0], marks[1], marks[2], marks[3] = 0, length, clock, threshold


def _admit_rows(
    page,
    held,
    selected,
    queue,
    marks,
    tokens,
    stamps,
    places,
    missing,
    missing_places,
    moved,
    gained,
    first_place,
    listed_least,
    first,
    last,
):
    capacity, kept = held.shape[1], tokens.shape[1]
    clock, recent = stamps
    index = np.empty(kept, np.int32)
    for row in range(first, last):
        misses, wanted, again, hits = 0, 0, 0, 0
        for i in range(kept):
            token = tokens[row, i]
            places[row, i] = -1
            if token < 0:
                continue
            wanted += 1
            slot = page[row, token]
            if slot >= 0:
                places[row, i] = slot + first_place
                again += selected[row, slot] >= recent
                selected[row, slot] = clock
                hits += 1
            else:
                missing[row, misses] = token
                index[misses] = i
                misses += 1
        moved[row] = misses
        gained[row, 0], gained[row, 1], gained[row, 2], gained[row, 3] = misses, wanted, hits, again
        if misses == 0:
            continue

        usable = 0
        for i in range(marks[row, 0], marks[row, 1]):
            usable += selected[row, queue[row, i]] < marks[row, 2]
        if usable < misses:
            _list_slots(selected[row], queue[row], marks[row], min(max(misses, listed_least), capacity - hits), clock)
        found, i = 0, marks[row, 0]
        while found < misses:
            if selected[row, queue[row, i]] < marks[row, 2]:
                missing_places[row, found] = queue[row, i]
                found += 1
            i += 1
        marks[row, 0] = i
        for i in range(misses):
            slot = missing_places[row, i]
            left = held[row, slot]
            if left >= 0:
                page[row, left] = -1
            page[row, missing[row, i]] = slot
            held[row, slot] = missing[row, i]
            selected[row, slot] = clock
            places[row, index[i]] = slot + first_place
            missing_places[row, i] = slot + first_place


_ADMIT = {
    torch.int16: compiled(_SIGNATURE.format(page="int16"))(_admit_rows),
    torch.int32: compiled(_SIGNATURE.format(page="int32"))(_admit_rows),
}


def admit_in_place(
    state: AdmitState,
    tokens: Tensor,
    stamps: tuple[int, int],
    first_place: int,
    result: AdmitResult,
    counts: Tensor | None,
    attended: bool,
) -> None:
    """Fill `result` as `admit_tokens` says; everything checked, on the CPU. Stamps: clock, recent."""
    rows, kept = result.moved.numel(), tokens.shape[2]
    if rows == 0:
        return
    # Views made by NumPy: torch's cost several times more, and a call spends most of its time on them.
    held = (state.page, state.tokens, state.selected, state.queue, state.marks)
    table = [value.numpy().reshape(rows, -1) for value in held]
    places = result.places.numpy()
    places = np.lib.stride_tricks.as_strided(places, (rows, kept), (places.strides[1], 8))
    fetched = [value.numpy().reshape(rows, kept) for value in (result.missing, result.missing_places)]
    gained = np.empty((rows, 4), np.int64)
    chosen = tokens.contiguous().numpy().reshape(rows, kept)
    moved = result.moved.numpy().reshape(rows)
    least = listed_slots(state.tokens.shape[2])
    admit = _ADMIT[state.page.dtype]

    def part(first: int, last: int) -> None:
        admit(*table, chosen, stamps, places, *fetched, moved, gained, first_place, least, first, last)

    run_split(part, rows, state.tokens.numel() // SLOTS_PER_THREAD)
    if counts is not None:
        columns = 4 if attended else 1
        counts.numpy().reshape(rows, 4)[:, :columns] += gained[:, :columns]
