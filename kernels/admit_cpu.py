"""The CPU's admission: both orders of the state walked and changed in place.

Import this module at first use: it loads Numba.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from ds_offload.kernels.admit_state import EMPTY, AdmitResult, AdmitState
from ds_offload.kernels.numba_runtime import compiled, run_split

# About a quarter of a millisecond.
SLOTS_PER_THREAD = 50_000


@compiled("int64(int64[:,::1], int64)")
def _disordered_row(tokens, empty):
    """The first row whose tokens do not ascend, -1 if there is none."""
    for row in range(tokens.shape[0]):
        last, padded = -1, False
        for token in tokens[row]:
            if token < 0:
                padded = True
            elif padded or token <= last or token >= empty:
                return row
            else:
                last = token
    return -1


@compiled(
    "void(int32[:,::1], int32[:,::1], int32[:,::1], int32[:,::1], int32[:,::1], int64[:,::1], int64, int64,"
    "int64[:,::1], int64[:,::1], int32[::1], int32[::1], int64, int64, int64)"
)
def _admit_rows(
    held, held_slots, order, selected, arrived, tokens, clock, began, slots, missing, moved, old, empty, first, last
):
    capacity, kept = held.shape[1], tokens.shape[1]
    victims = np.empty(kept, np.int32)
    for row in range(first, last):
        # Tokens and those held both ascend: one walk finds the hits.
        place, misses, olds = 0, 0, 0
        for i in range(kept):
            token = tokens[row, i]
            slots[row, i] = 0
            missing[row, i] = -1
            if token < 0:
                continue
            while place < capacity and held[row, place] < token:
                place += 1
            if place < capacity and held[row, place] == token:
                slot = held_slots[row, place]
                slots[row, i] = slot
                selected[row, slot] = clock
                olds += arrived[row, slot] < began
            else:
                missing[row, i] = token
                misses += 1
        moved[row], old[row] = misses, olds

        # The first slots not selected now are the victims; the selected ones end the order.
        found, target = 0, 0
        for i in range(capacity):
            slot = order[row, i]
            if selected[row, slot] != clock:
                if found < misses:
                    victims[found] = slot
                    found += 1
                    selected[row, slot] = clock
                    arrived[row, slot] = clock
                else:
                    order[row, target] = slot
                    target += 1
        for slot in range(capacity):
            if selected[row, slot] == clock:
                order[row, target] = slot
                target += 1

        # Close the gaps of the victims' tokens, then merge the new ones in from the end.
        if misses == 0:
            continue
        stays = 0
        for i in range(capacity):
            if held[row, i] == empty:
                break
            slot = held_slots[row, i]
            if arrived[row, slot] != clock:
                held[row, stays] = held[row, i]
                held_slots[row, stays] = slot
                stays += 1
        target = stays + misses - 1
        for i in range(kept - 1, -1, -1):
            token = missing[row, i]
            if token < 0:
                continue
            while stays > 0 and held[row, stays - 1] > token:
                stays -= 1
                held[row, target] = held[row, stays]
                held_slots[row, target] = held_slots[row, stays]
                target -= 1
            misses -= 1
            slots[row, i] = victims[misses]
            held[row, target] = token
            held_slots[row, target] = victims[misses]
            target -= 1


def admit_in_place(state: AdmitState, tokens: Tensor, clock: int, began: int, result: AdmitResult) -> int:
    """Fill `result` as `admit_tokens` says; shapes, dtypes and devices checked, on the CPU.

    Returns:
        The first row whose tokens do not ascend, then nothing is changed; -1 if there is none.
    """
    rows = result.moved.numel()
    if rows == 0:
        return -1
    # Views made by NumPy: torch's cost several times more, and a call spends most of its time on them.
    shape = (rows, tokens.shape[2])
    chosen = tokens.contiguous().numpy().reshape(shape)
    disordered = int(_disordered_row(chosen, EMPTY))
    if disordered >= 0:
        return disordered
    held = (state.tokens, state.token_slots, state.order, state.selected, state.arrived)
    table = [value.numpy().reshape(rows, -1) for value in held]
    places = [value.numpy().reshape(shape) for value in (result.slots, result.missing)]
    counts = [value.numpy().reshape(rows) for value in (result.moved, result.old)]

    def part(first: int, last: int) -> None:
        _admit_rows(*table, chosen, clock, began, *places, *counts, EMPTY, first, last)

    run_split(part, rows, state.tokens.numel() // SLOTS_PER_THREAD)
    return -1
