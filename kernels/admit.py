"""Admission of selected tokens to a fixed number of slots, the least recently selected leaving."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ds_offload.kernels.admit_state import NONE, AdmitResult, AdmitState, check_admit, result_for
from ds_offload.kernels.triton_runtime import jit, launching, power_of_two, tl


@dataclass(frozen=True)
class AdmitLaunch:
    """Launch of the CUDA kernel, one program a row: entries handled at a time, stamps counted at a time, warps."""

    tile: int
    bins: int
    warps: int


def admit_launch(capacity: int) -> AdmitLaunch:
    """The launch for a number of slots.

    A program waits for memory most of its time, so it takes few, large tiles: as many
    threads as a program may have, eight entries each. Slots that leave were last selected
    within few admissions of one another, so 128 stamps nearly always hold them all.
    """
    tile = min(8192, max(256, power_of_two(capacity)))
    return AdmitLaunch(tile, bins=128, warps=max(1, min(32, tile // 128)))


@jit(do_not_specialize=["tokens", "clock", "began", "places_stride", "context", "capacity", "kept", "first_place"])
def _admit_kernel(
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
    counts,
    scratch,
    places_stride,
    context,
    capacity,
    kept,
    first_place,
    COUNTED: tl.constexpr,
    ATTENDED: tl.constexpr,
    BINS: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program admits the tokens of one row. Its threads exchange data through memory, with barriers between."""
    row = tl.program_id(0).to(tl.int64)
    page += row * context
    held += row * capacity
    selected += row * capacity
    arrived += row * capacity
    tokens += row * kept
    places += row * places_stride
    missing += row * kept
    missing_places += row * kept
    miss_index = scratch + row * 2 * kept
    victims = miss_index + kept
    now = tl.load(clock)
    step_began = tl.load(began)
    lane = tl.arange(0, TILE)

    # Look every token up; stamp the slots of those found, list the others.
    misses = 0
    wanted_count = tl.zeros([TILE], tl.int32)
    old_count = tl.zeros([TILE], tl.int32)
    again_count = tl.zeros([TILE], tl.int32)
    for first in range(0, kept, TILE):
        i = first + lane
        token = tl.load(tokens + i, mask=i < kept, other=-1)
        wanted = (token >= 0) & (token < context)
        slot = tl.load(page + token, mask=wanted, other=-1).to(tl.int32)
        hit = wanted & (slot >= 0)
        stamp = tl.load(selected + slot, mask=hit, other=0)
        arrival = tl.load(arrived + slot, mask=hit, other=step_began)
        tl.store(selected + slot, now, mask=hit)
        wanted_count += wanted.to(tl.int32)
        old_count += (hit & (arrival < step_began)).to(tl.int32)
        again_count += (hit & (stamp >= step_began)).to(tl.int32)
        miss = wanted & (slot < 0)
        missed = miss.to(tl.int32)
        rank = misses + tl.cumsum(missed, 0) - missed
        tl.store(missing + rank, token, mask=miss)
        tl.store(miss_index + rank, i, mask=miss)
        # Misses get theirs below.
        tl.store(places + i, tl.where(hit, slot + first_place, -1).to(tl.int64), mask=i < kept)
        misses += tl.sum(missed, 0)
    tl.store(moved + row, misses)
    if COUNTED:
        counts += row * 4
        tl.store(counts, tl.load(counts) + misses)
        if ATTENDED:
            tl.store(counts + 1, tl.load(counts + 1) + tl.sum(wanted_count, 0))
            tl.store(counts + 2, tl.load(counts + 2) + tl.sum(old_count, 0))
            tl.store(counts + 3, tl.load(counts + 3) + tl.sum(again_count, 0))

    if misses > 0:
        tl.debug_barrier()
        # The stamp of the last slot that must leave: slots are counted by stamp from the oldest on,
        # and whatever is outside the counted range falls into the last bin.
        base = tl.load(oldest + row)
        below = 0
        threshold = base
        reached = 0
        each = tl.arange(0, BINS)
        while reached < misses:
            histogram = tl.zeros([BINS], tl.int32)
            for first in range(0, capacity, TILE):
                inside = first + lane < capacity
                age = tl.load(selected + first + lane, mask=inside, other=now) - base
                counted = inside & (age >= 0) & (age < BINS - 1)
                histogram += tl.histogram(tl.where(counted, age, BINS - 1), BINS)
            slots_at = tl.where(each < BINS - 1, histogram, 0)
            reach = below + tl.cumsum(slots_at, 0)
            short = reach < misses
            reached = below + tl.sum(slots_at, 0)
            threshold = base + tl.sum(short.to(tl.int32), 0)
            below = tl.maximum(below, tl.max(tl.where(short, reach, 0), 0))
            base += BINS - 1
        tl.store(oldest + row, threshold)

        # Those below the threshold are all victims, and come first; of those at it, the lowest slots.
        lower_before = 0
        equal_before = below
        for first in range(0, capacity, TILE):
            slot = first + lane
            stamp = tl.load(selected + slot, mask=slot < capacity, other=now)
            lower = stamp < threshold
            equal = stamp == threshold
            # Both counts of a tile fit one number: the scan is the dearest part.
            both = lower.to(tl.int32) + (equal.to(tl.int32) << 16)
            before = tl.cumsum(both, 0) - both
            rank = equal_before + (before >> 16)
            tl.store(victims + lower_before + (before & 0xFFFF), slot, mask=lower)
            tl.store(victims + rank, slot, mask=equal & (rank < misses))
            total = tl.sum(both, 0)
            lower_before += total & 0xFFFF
            equal_before += total >> 16
        tl.debug_barrier()

        for first in range(0, misses, TILE):
            i = first + lane
            live = i < misses
            slot = tl.load(victims + i, mask=live, other=0)
            token = tl.load(missing + i, mask=live, other=0)
            index = tl.load(miss_index + i, mask=live, other=0)
            left = tl.load(held + slot, mask=live, other=-1)
            place = (slot + first_place).to(tl.int64)
            tl.store(page + left, -1, mask=live & (left >= 0))
            tl.store(page + token, slot, mask=live)
            tl.store(held + slot, token.to(tl.int32), mask=live)
            tl.store(selected + slot, now, mask=live)
            tl.store(arrived + slot, now, mask=live)
            tl.store(places + index, place, mask=live)
            tl.store(missing_places + i, place, mask=live)


def admit_tokens(
    state: AdmitState,
    tokens: Tensor,
    clock: Tensor,
    began: Tensor,
    *,
    first_place: int = 0,
    places: Tensor | None = None,
    counts: Tensor | None = None,
    attended: bool = True,
) -> AdmitResult:
    """Give every selected token a slot, in place of the least recently selected ones.

    A token that is held keeps its slot. The others take those slots that this admission
    does not select and whose (stamp of the last selection, slot number) is lowest, so
    empty ones first: in the order of the tokens, the slots below the highest of those
    stamps by number, then the slots at it by number. Their tokens leave. Every selected
    slot is stamped `clock`. On CUDA this is one launch, which waits for nothing and may be
    captured in a graph.

    Args:
        state: Changed in place.
        tokens: int64 [B, Hkv, K] on the state's device, K <= C, distinct in a row and
            below the state's context; -1, anywhere, for padding.
        clock: int32 scalar on the device: the stamp of this admission, at least 1 and
            above the stamps of all earlier ones.
        began: int32 scalar on the device: earlier steps' stamps are below it.
        first_place: The place of slot 0.
        places: int64 [B, Hkv, K] for the result, its rows contiguous and one distance apart.
        counts: int64 [B, Hkv, 4], added to: tokens to fetch; and if `attended` all tokens,
            those that were there and had arrived before `began`, and those that an
            admission since `began` had selected too.
        attended: Whether this selection is the one that is attended to.

    Returns:
        Places, and what must be fetched.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; on the CPU also a token beyond
            the context. On CUDA, where checking would wait for the device, such a token
            counts as padding.
    """
    check_admit(state, tokens, clock, began, places, counts)
    result = result_for(tokens, places)
    if tokens.is_cuda:
        with launching(tokens.device, "admit_tokens"):
            _launch(state, tokens, clock, began, first_place, result, counts, attended)
        return result
    # Loads Numba, which takes a second: at first use.
    from ds_offload.kernels.admit_cpu import admit_in_place

    _check_tokens(state, tokens)
    admit_in_place(state, tokens, int(clock), int(began), first_place, result, counts, attended)
    return result


def _launch(
    state: AdmitState,
    tokens: Tensor,
    clock: Tensor,
    began: Tensor,
    first_place: int,
    result: AdmitResult,
    counts: Tensor | None,
    attended: bool,
) -> None:
    rows, kept, capacity = result.moved.numel(), tokens.shape[2], state.tokens.shape[2]
    if rows == 0:
        return
    launch = admit_launch(capacity)
    _admit_kernel[(rows,)](
        *(state.page, state.tokens, state.selected, state.arrived, state.oldest),
        *(tokens.contiguous(), clock, began),
        *(result.places, result.missing, result.missing_places, result.moved),
        counts if counts is not None else result.moved,
        torch.empty(rows, 2, kept, dtype=torch.int32, device=tokens.device),
        *(result.places.stride(1), state.page.shape[2], capacity, kept, first_place),
        COUNTED=counts is not None,
        ATTENDED=attended,
        BINS=launch.bins,
        TILE=launch.tile,
        num_warps=launch.warps,
    )


def admit_tokens_reference(
    state: AdmitState,
    tokens: Tensor,
    clock: Tensor,
    began: Tensor,
    *,
    first_place: int = 0,
    places: Tensor | None = None,
    counts: Tensor | None = None,
    attended: bool = True,
) -> AdmitResult:
    """`admit_tokens` in plain Python and torch, row by row. Waits for the device."""
    check_admit(state, tokens, clock, began, places, counts)
    _check_tokens(state, tokens)
    result = result_for(tokens, places)
    now, step_began = int(clock), int(began)
    for b, h in torch.cartesian_prod(*(torch.arange(n) for n in tokens.shape[:2])).tolist():
        page, held, selected, arrived = (x[b, h] for x in (state.page, state.tokens, state.selected, state.arrived))
        wanted = tokens[b, h][tokens[b, h] >= 0]
        slots = page[wanted].long()
        hit = slots >= 0
        old = int((arrived[slots[hit]] < step_began).sum())
        again = int((selected[slots[hit]] >= step_began).sum())
        selected[slots[hit]] = now
        missing = wanted[~hit]
        victims = selected.sort(stable=True).indices[: len(missing)]
        if len(missing):
            highest = selected[victims[-1]]
            at_highest = selected[victims] == highest
            victims = torch.cat((victims[~at_highest].sort().values, victims[at_highest]))
            state.oldest[b, h] = highest
        left = held[victims].long()
        page[left[left >= 0]] = NONE
        page[missing] = victims.to(page.dtype)
        held[victims] = missing.int()
        selected[victims] = now
        arrived[victims] = now
        result.missing[b, h, : len(missing)] = missing
        result.missing_places[b, h, : len(missing)] = victims + first_place
        result.moved[b, h] = len(missing)
        result.places[b, h] = NONE
        result.places[b, h, tokens[b, h] >= 0] = page[wanted].long() + first_place
        if counts is not None:
            gained = [len(missing), len(wanted), old, again] if attended else [len(missing), 0, 0, 0]
            counts[b, h] += torch.tensor(gained, device=counts.device)
    return result


def _check_tokens(state: AdmitState, tokens: Tensor) -> None:
    context = state.page.shape[2]
    if tokens.numel() and int(tokens.max()) >= context:
        raise ValueError(f"token {int(tokens.max())} is beyond the state's context of {context} tokens")
