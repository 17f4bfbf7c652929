"""The CPU's admission: every row's slots looked up and changed in place.

Import this module at first use: it loads Numba.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ds_offload.kernels.admit_state import AdmitResult, AdmitState
from ds_offload.kernels.numba_runtime import compiled, run_split

# About a quarter of a millisecond.
SLOTS_PER_THREAD = 50_000

_SIGNATURE = (
    "void({page}[:,::1], int32[:,::1], int32[:,::1], int32[:,::1], int32[::1], int64[:,::1], int64, int64,"
    "int64[:,:], int64[:,::1], int64[:,::1], int32[::1], int64[:,::1], int64, int64, int64)"
)


def _admit_rows(
    page,
    held,
    selected,
    arrived,
    oldest,
    tokens,
    clock,
    began,
    places,
    missing,
    missing_places,
    moved,
    gained,
    first_place,
    first,
    last,
):
    capacity, kept = held.shape[1], tokens.shape[1]
    index = np.empty(kept, np.int32)
    for row in range(first, last):
        misses, wanted, old, again = 0, 0, 0, 0
        for i in range(kept):
            token = tokens[row, i]
            places[row, i] = -1
            if token < 0:
                continue
            wanted += 1
            slot = page[row, token]
            if slot >= 0:
                places[row, i] = slot + first_place
                old += arrived[row, slot] < began
                again += selected[row, slot] >= began
                selected[row, slot] = clock
            else:
                missing[row, misses] = token
                index[misses] = i
                misses += 1
        moved[row] = misses
        gained[row, 0], gained[row, 1], gained[row, 2], gained[row, 3] = misses, wanted, old, again
        if misses == 0:
            continue

        # The stamp of the last slot that must leave, and how many leave that are older.
        base = np.int64(oldest[row])
        counts = np.zeros(clock - base + 1, np.int64)
        for slot in range(capacity):
            counts[selected[row, slot] - base] += 1
        below, threshold = 0, base
        while below + counts[threshold - base] < misses:
            below += counts[threshold - base]
            threshold += 1
        oldest[row] = threshold

        lower, equal = 0, below
        for slot in range(capacity):
            if selected[row, slot] < threshold:
                missing_places[row, lower] = slot
                lower += 1
            elif selected[row, slot] == threshold and equal < misses:
                missing_places[row, equal] = slot
                equal += 1
        for i in range(misses):
            slot = missing_places[row, i]
            left = held[row, slot]
            if left >= 0:
                page[row, left] = -1
            page[row, missing[row, i]] = slot
            held[row, slot] = missing[row, i]
            selected[row, slot] = clock
            arrived[row, slot] = clock
            places[row, index[i]] = slot + first_place
            missing_places[row, i] = slot + first_place


_ADMIT = {
    torch.int16: compiled(_SIGNATURE.format(page="int16"))(_admit_rows),
    torch.int32: compiled(_SIGNATURE.format(page="int32"))(_admit_rows),
}


def admit_in_place(
    state: AdmitState,
    tokens: Tensor,
    clock: int,
    began: int,
    first_place: int,
    result: AdmitResult,
    counts: Tensor | None,
    attended: bool,
) -> None:
    """Fill `result` as `admit_tokens` says; everything checked, on the CPU."""
    rows, kept = result.moved.numel(), tokens.shape[2]
    if rows == 0:
        return
    # Views made by NumPy: torch's cost several times more, and a call spends most of its time on them.
    held = (state.page, state.tokens, state.selected, state.arrived)
    table = [value.numpy().reshape(rows, -1) for value in held]
    places = result.places.numpy()
    places = np.lib.stride_tricks.as_strided(places, (rows, kept), (places.strides[1], 8))
    fetched = [value.numpy().reshape(rows, kept) for value in (result.missing, result.missing_places)]
    gained = np.empty((rows, 4), np.int64)
    chosen = tokens.contiguous().numpy().reshape(rows, kept)
    oldest, moved = state.oldest.numpy().reshape(rows), result.moved.numpy().reshape(rows)
    admit = _ADMIT[state.page.dtype]

    def part(first: int, last: int) -> None:
        admit(*table, oldest, chosen, clock, began, places, *fetched, moved, gained, first_place, first, last)

    run_split(part, rows, state.tokens.numel() // SLOTS_PER_THREAD)
    if counts is not None:
        columns = 4 if attended else 1
        counts.numpy().reshape(rows, 4)[:, :columns] += gained[:, :columns]
