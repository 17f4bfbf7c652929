"""Admission of selected tokens to a fixed number of slots, the least recently selected leaving."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ds_offload.kernels.admit_state import EMPTY, AdmitResult, AdmitState, check_admit, disorder, empty_result
from ds_offload.kernels.triton_runtime import jit, launching, power_of_two, tl


@dataclass(frozen=True)
class AdmitLaunch:
    """Launch of the CUDA kernel, one program a row: entries handled at a time, warps."""

    tile: int
    warps: int


def admit_launch(capacity: int) -> AdmitLaunch:
    """The launch for a number of slots.

    A program waits for memory most of its time, so it takes few, large tiles: as many
    threads as a program may have, four entries each.
    """
    tile = min(4096, max(128, power_of_two(capacity)))
    return AdmitLaunch(tile, warps=max(1, tile // 128))


@jit(do_not_specialize=["tokens", "clock", "began", "capacity", "kept"])
def _admit_kernel(
    held,
    held_slots,
    order,
    selected,
    arrived,
    tokens,
    clock,
    began,
    slots,
    missing,
    moved,
    old,
    scratch,
    capacity,
    kept,
    EMPTY: tl.constexpr,
    STEPS: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program admits the tokens of one row. Its threads exchange data through memory, with barriers between."""
    row = tl.program_id(0).to(tl.int64)
    held += row * capacity
    held_slots += row * capacity
    order += row * capacity
    selected += row * capacity
    arrived += row * capacity
    tokens += row * kept
    slots += row * kept
    missing += row * kept
    stays_before = scratch + row * 3 * (capacity + kept)
    stay_tokens = stays_before + capacity
    stay_slots = stay_tokens + capacity
    miss_index = stay_slots + capacity
    miss_place = miss_index + kept
    victims = miss_place + kept
    now = tl.load(clock)
    step_began = tl.load(began)
    lane = tl.arange(0, TILE)

    # How many tokens are held. This also brings them into the cache that the searches read.
    count = tl.zeros([TILE], tl.int32)
    for first in range(0, capacity, TILE):
        token = tl.load(held + first + lane, mask=first + lane < capacity, other=EMPTY)
        count += (token != EMPTY).to(tl.int32)
    size = tl.sum(count, 0)

    # Find each new token; stamp the slots of those found, list the others in ascending order.
    misses = 0
    old_count = tl.zeros([TILE], tl.int32)
    for first in range(0, kept, TILE):
        i = first + lane
        token = tl.load(tokens + i, mask=i < kept, other=-1).to(tl.int32)
        wanted = (token >= 0) & (token < EMPTY)
        # Binary search: the number of held tokens below this one.
        place = tl.zeros([TILE], tl.int32)
        for step in tl.static_range(STEPS):
            probe = place + (1 << (STEPS - 1 - step))
            value = tl.load(held + probe - 1, mask=wanted & (probe <= size), other=EMPTY)
            place = tl.where(value < token, probe, place)
        hit = wanted & (tl.load(held + place, mask=wanted & (place < size), other=-1) == token)
        slot = tl.load(held_slots + place, mask=hit, other=0)
        arrival = tl.load(arrived + slot, mask=hit, other=step_began)
        tl.store(selected + slot, now, mask=hit)
        old_count += (hit & (arrival < step_began)).to(tl.int32)
        miss = wanted & (hit == 0)
        missed = miss.to(tl.int32)
        rank = misses + tl.cumsum(missed, 0) - missed
        tl.store(miss_index + rank, i, mask=miss)
        tl.store(miss_place + rank, place, mask=miss)
        tl.store(missing + i, tl.where(miss, token, -1).to(tl.int64), mask=i < kept)
        # Misses get theirs below.
        tl.store(slots + i, slot.to(tl.int64), mask=(i < kept) & (miss == 0))
        misses += tl.sum(missed, 0)
    tl.store(moved + row, misses)
    tl.store(old + row, tl.sum(old_count, 0))
    tl.debug_barrier()

    # The first slots in order that are not selected now are the victims; the others close the gaps.
    idle_before = 0
    for first in range(0, capacity, TILE):
        inside = first + lane < capacity
        slot = tl.load(order + first + lane, mask=inside, other=0)
        idle = inside & (tl.load(selected + slot, mask=inside, other=0) != now)
        idles = idle.to(tl.int32)
        rank = idle_before + tl.cumsum(idles, 0) - idles
        victim = idle & (rank < misses)
        # Every thread has read its part of `order` before another writes there.
        tl.debug_barrier()
        tl.store(victims + rank, slot, mask=victim)
        tl.store(selected + slot, now, mask=victim)
        tl.store(arrived + slot, now, mask=victim)
        tl.store(order + rank - misses, slot, mask=idle & (rank >= misses))
        idle_before += tl.sum(idles, 0)
    tl.debug_barrier()

    # By slot: those selected now end the order. By token: those that stay are ranked and put aside.
    # Both counts of a tile fit one number: the scan is the dearest part.
    chosen_before = idle_before - misses
    stays = 0
    for first in range(0, capacity, TILE):
        i = first + lane
        inside = i < capacity
        chosen = inside & (tl.load(selected + i, mask=inside, other=0) == now)
        token = tl.load(held + i, mask=inside, other=EMPTY)
        slot = tl.load(held_slots + i, mask=token != EMPTY, other=0)
        stay = (token != EMPTY) & (tl.load(arrived + slot, mask=token != EMPTY, other=0) != now)
        both = chosen.to(tl.int32) + (stay.to(tl.int32) << 16)
        before = tl.cumsum(both, 0) - both
        rank = stays + (before >> 16)
        tl.store(order + chosen_before + (before & 0xFFFF), i, mask=chosen)
        tl.store(stays_before + i, rank, mask=inside)
        tl.store(stay_tokens + rank, token, mask=stay)
        tl.store(stay_slots + rank, slot, mask=stay)
        # Not filled yet.
        tl.store(held + i, -1, mask=inside)
        total = tl.sum(both, 0)
        chosen_before += total & 0xFFFF
        stays += total >> 16
    tl.debug_barrier()

    # New tokens go behind the new and the staying ones below them.
    for first in range(0, misses, TILE):
        rank = first + lane
        live = rank < misses
        index = tl.load(miss_index + rank, mask=live, other=0)
        place = tl.load(miss_place + rank, mask=live, other=0)
        slot = tl.load(victims + rank, mask=live, other=0)
        target = rank + tl.load(stays_before + place, mask=live & (place < capacity), other=stays)
        tl.store(held + target, tl.load(tokens + index, mask=live, other=0).to(tl.int32), mask=live)
        tl.store(held_slots + target, slot, mask=live)
        tl.store(slots + index, slot.to(tl.int64), mask=live)
    tl.debug_barrier()

    # The staying ones fill what is left, in order.
    unfilled_before = 0
    for first in range(0, capacity, TILE):
        i = first + lane
        unfilled = tl.load(held + i, mask=i < capacity, other=0) < 0
        holes = unfilled.to(tl.int32)
        rank = unfilled_before + tl.cumsum(holes, 0) - holes
        stay = unfilled & (rank < stays)
        tl.store(held + i, tl.load(stay_tokens + rank, mask=stay, other=EMPTY), mask=unfilled)
        tl.store(held_slots + i, tl.load(stay_slots + rank, mask=stay, other=-1), mask=unfilled)
        unfilled_before += tl.sum(holes, 0)


def admit_tokens(state: AdmitState, tokens: Tensor, clock: Tensor, began: Tensor) -> AdmitResult:
    """Give every selected token a slot, in place of the least recently selected ones.

    A token that is held keeps its slot. Each other one takes a victim's: the slots that
    this admission does not select, in order of (stamp of the last selection, slot
    number), so empty ones first, are paired with the missing tokens in ascending order.
    Victims' tokens leave. Every selected slot is stamped `clock`. On CUDA this is one
    launch, which waits for nothing and may be captured in a graph.

    Args:
        state: Changed in place.
        tokens: int64 [B, Hkv, K] on the state's device, K <= C, below 2**31 - 1;
            ascending and distinct in a row, -1 for padding.
        clock: int32 scalar on the device: the stamp of this admission, at least 1 and
            above the stamps of all earlier ones.
        began: int32 scalar on the device: earlier steps' stamps are below it.

    Returns:
        Slots and what must be fetched into them; every element is written.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; on the CPU also tokens that do
            not ascend. On CUDA, where checking would wait for the device, the slots
            of such a row are still within the state, its tokens' places are not defined.
    """
    check_admit(state, tokens, clock, began)
    if tokens.is_cuda:
        with launching(tokens.device, "admit_tokens"):
            return _launch(state, tokens, clock, began)
    # Loads Numba, which takes a second: at first use.
    from ds_offload.kernels.admit_cpu import admit_in_place

    result = empty_result(tokens)
    row = admit_in_place(state, tokens, int(clock), int(began), result)
    if row >= 0:
        raise ValueError(disorder(row))
    return result


def _launch(state: AdmitState, tokens: Tensor, clock: Tensor, began: Tensor) -> AdmitResult:
    batch, kv_heads, capacity = state.tokens.shape
    kept = tokens.shape[2]
    result = empty_result(tokens)
    if result.moved.numel() == 0:
        return result
    scratch = torch.empty(batch * kv_heads, 3, capacity + kept, dtype=torch.int32, device=tokens.device)
    launch = admit_launch(capacity)
    _admit_kernel[(batch * kv_heads,)](
        state.tokens,
        state.token_slots,
        state.order,
        state.selected,
        state.arrived,
        tokens.contiguous(),
        clock,
        began,
        result.slots,
        result.missing,
        result.moved,
        result.old,
        scratch,
        capacity,
        kept,
        EMPTY=EMPTY,
        STEPS=capacity.bit_length(),
        TILE=launch.tile,
        num_warps=launch.warps,
    )
    return result


def admit_tokens_reference(state: AdmitState, tokens: Tensor, clock: Tensor, began: Tensor) -> AdmitResult:
    """`admit_tokens` in torch: both orders are sorted anew. Waits for the device."""
    check_admit(state, tokens, clock, began)
    wanted = tokens >= 0
    limit = torch.where(wanted, tokens, EMPTY)
    wrong = (((limit.diff(dim=-1) <= 0) & wanted[..., 1:]).any(-1) | (tokens >= EMPTY).any(-1)).flatten().nonzero()
    if len(wrong):
        raise ValueError(disorder(int(wrong[0])))
    capacity = state.tokens.shape[2]
    # A column behind the slots takes what is written for entries that have none.
    by_slot = torch.full((*state.tokens.shape[:2], capacity + 1), EMPTY, dtype=torch.int32, device=tokens.device)
    by_slot.scatter_(-1, state.token_slots.long() % (capacity + 1), state.tokens)
    selected, arrived = (torch.nn.functional.pad(stamps, (0, 1)) for stamps in (state.selected, state.arrived))

    small = tokens.to(torch.int32)
    place = torch.searchsorted(state.tokens, small).clamp(max=capacity - 1)
    hit = wanted & (state.tokens.gather(-1, place) == small)
    hit_slot = torch.where(hit, state.token_slots.gather(-1, place).long(), capacity)
    selected.scatter_(-1, hit_slot, clock.expand_as(hit_slot))
    old = hit & (arrived.gather(-1, hit_slot) < began)

    victims = selected[..., :capacity].argsort(dim=-1, stable=True)
    miss = wanted & ~hit
    victim = victims.gather(-1, (miss.cumsum(-1) - 1).clamp(min=0))
    miss_slot = torch.where(miss, victim, capacity)
    by_slot.scatter_(-1, miss_slot, small)
    for stamps in (selected, arrived):
        stamps.scatter_(-1, miss_slot, clock.expand_as(miss_slot))

    held, slots = by_slot[..., :capacity].sort(-1)
    state.tokens.copy_(held)
    state.token_slots.copy_(slots.masked_fill(held == EMPTY, -1))
    state.order.copy_(selected[..., :capacity].argsort(dim=-1, stable=True))
    state.selected.copy_(selected[..., :capacity])
    state.arrived.copy_(arrived[..., :capacity])
    return AdmitResult(
        slots=torch.where(miss, miss_slot, hit_slot.masked_fill(~hit, 0)),
        missing=tokens.masked_fill(~miss, -1),
        moved=miss.sum(-1, dtype=torch.int32),
        old=old.sum(-1, dtype=torch.int32),
    )
