"""Admission of selected tokens to a fixed number of slots, the least recently selected leaving."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ds_offload.kernels.admit_kernels import look_up_kernel, settle_kernel
from ds_offload.kernels.admit_state import NONE, AdmitResult, AdmitState, check_admit, listed_slots, result_for
from ds_offload.kernels.triton_runtime import launching, power_of_two


@dataclass(frozen=True)
class AdmitLaunch:
    """Launch of the CUDA kernels.

    Attributes:
        part: Tokens that one program looks up.
        tile: Missing tokens, and entries of the queue, that one program handles at a time.
        list_tile: Slots it looks at at a time when it lists the queue anew.
        bins: Stamps counted at a time.
        warps, settle_warps: Warps of a program that looks up, and of one that settles.
        slice: Parts among which a missing token's is found at a time; a power of two. Up to 32,768 tokens have no more.
    """

    part: int = 1024
    tile: int = 1024
    list_tile: int = 8192
    bins: int = 128
    warps: int = 8
    settle_warps: int = 16
    slice: int = 32


def admit_launch(kept: int) -> AdmitLaunch:
    """The launch for rows of `kept` tokens.

    Looking up is scattered reads, of which one multiprocessor does few: 1,024 tokens a
    program. What follows has one program a row, but is about the missing tokens alone,
    and now and then about the queue. Slots that leave were last selected within few
    admissions of one another, so 128 stamps nearly always hold them all.
    """
    return AdmitLaunch(part=min(1024, max(128, power_of_two(kept))))


def admit_tokens(
    state: AdmitState,
    tokens: Tensor,
    clock: Tensor,
    recent: Tensor,
    *,
    first_place: int = 0,
    places: Tensor | None = None,
    counts: Tensor | None = None,
    attended: bool = True,
) -> AdmitResult:
    """Give every selected token a slot, in place of the least recently selected ones.

    A token that is held keeps its slot. The others take slots from the front of the
    state's queue, those selected since it was listed passed over, and their tokens leave.
    Where too few are left, the queue is listed anew: the slots that this admission does not
    select and whose (stamp of the last selection, slot number) is lowest, empty ones first,
    as many as are missing but at least `listed_slots`; those below the highest of their
    stamps by slot number, then those at it. Every selected slot is stamped `clock`. On CUDA
    these are two launches, which wait for nothing and may be captured in a graph.

    Args:
        state: Changed in place.
        tokens: int64 [B, Hkv, K] on the state's device, K <= C, distinct in a row and
            below the state's context; -1, anywhere, for padding.
        clock: int32 scalar on the device: the stamp of this admission, at least 1 and
            above the stamps of all earlier ones.
        recent: int32 scalar on the device: stamps from it on count as recent.
        first_place: The place of slot 0.
        places: int64 [B, Hkv, K] for the result, its rows contiguous and one distance apart.
        counts: int64 [B, Hkv, 4], added to: tokens to fetch; and if `attended` all tokens,
            those that were there, and those whose last selection was recent.
        attended: Whether this selection is the one that is attended to.

    Returns:
        Places, and what must be fetched.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; on the CPU also a token beyond
            the context. On CUDA, where checking would wait for the device, such a token
            counts as padding.
    """
    check_admit(state, tokens, clock, recent, places, counts)
    result = result_for(tokens, places)
    if tokens.is_cuda:
        with launching(tokens.device, "admit_tokens"):
            _launch(state, tokens, clock, recent, first_place, result, counts, attended)
        return result
    # Loads Numba, which takes a second: at first use.
    from ds_offload.kernels.admit_cpu import admit_in_place

    _check_tokens(state, tokens)
    stamps = int(clock), int(recent)
    admit_in_place(state, tokens, stamps, first_place, result, counts, attended)
    return result


def _launch(
    state: AdmitState,
    tokens: Tensor,
    clock: Tensor,
    recent: Tensor,
    first_place: int,
    result: AdmitResult,
    counts: Tensor | None,
    attended: bool,
) -> None:
    rows, kept, capacity = result.moved.numel(), tokens.shape[2], state.tokens.shape[2]
    if rows == 0:
        return
    launch = admit_launch(kept)
    parts = max(1, -(-kept // launch.part))
    tokens = tokens.contiguous()
    scratch = torch.empty(2, rows, parts * launch.part, dtype=torch.int32, device=tokens.device)
    sums = torch.empty(rows, 3, parts, dtype=torch.int32, device=tokens.device)
    places_stride = result.places.stride(1)
    look_up_kernel[(parts, rows)](
        *(state.page, state.selected, tokens, clock, recent, result.places, scratch, sums),
        *(places_stride, state.page.shape[2], capacity, kept, first_place),
        PART=launch.part,
        num_warps=launch.warps,
    )
    settle_kernel[(rows,)](
        *(state.page, state.tokens, state.selected, state.queue, state.marks, tokens, clock),
        *(result.places, result.missing, result.missing_places, result.moved, result.progress),
        counts if counts is not None else result.moved,
        *(scratch[0], scratch[1], sums, places_stride, state.page.shape[2], capacity, kept, first_place),
        *(listed_slots(capacity), parts),
        COUNTED=counts is not None,
        ATTENDED=attended,
        PART=launch.part,
        PARTS_PAD=power_of_two(parts),
        SLICE=launch.slice,
        TILE=launch.tile,
        LIST_TILE=launch.list_tile,
        BINS=launch.bins,
        num_warps=launch.settle_warps,
    )


def admit_tokens_reference(
    state: AdmitState,
    tokens: Tensor,
    clock: Tensor,
    recent: Tensor,
    *,
    first_place: int = 0,
    places: Tensor | None = None,
    counts: Tensor | None = None,
    attended: bool = True,
) -> AdmitResult:
    """`admit_tokens` in plain Python and torch, row by row. Waits for the device."""
    check_admit(state, tokens, clock, recent, places, counts)
    _check_tokens(state, tokens)
    result = result_for(tokens, places)
    now, since = int(clock), int(recent)
    for b, h in torch.cartesian_prod(*(torch.arange(n) for n in tokens.shape[:2])).tolist():
        page, held, selected = (x[b, h] for x in (state.page, state.tokens, state.selected))
        wanted = tokens[b, h][tokens[b, h] >= 0]
        slots = page[wanted].long()
        hit = slots >= 0
        again = int((selected[slots[hit]] >= since).sum())
        selected[slots[hit]] = now
        missing = wanted[~hit]
        victims = _take_slots(selected, state.queue[b, h], state.marks[b, h], len(missing), int(hit.sum()), now)
        left = held[victims].long()
        page[left[left >= 0]] = NONE
        page[missing] = victims.to(page.dtype)
        held[victims] = missing.int()
        selected[victims] = now
        result.missing[b, h, : len(missing)] = missing
        result.missing_places[b, h, : len(missing)] = victims + first_place
        result.moved[b, h] = len(missing)
        result.places[b, h] = NONE
        result.places[b, h, tokens[b, h] >= 0] = page[wanted].long() + first_place
        if counts is not None:
            gained = [len(missing), len(wanted), int(hit.sum()), again] if attended else [len(missing), 0, 0, 0]
            counts[b, h] += torch.tensor(gained, device=counts.device)
    return result


def _take_slots(selected: Tensor, queue: Tensor, marks: Tensor, count: int, hits: int, now: int) -> Tensor:
    """The next `count` slots to give away, from the queue or from a new one."""
    taken, listed, listed_at, _ = marks.tolist()
    entries = queue[taken:listed].long()
    usable = (selected[entries] < listed_at).nonzero().flatten()
    if len(usable) < count:
        length = min(max(count, listed_slots(len(selected))), len(selected) - hits)
        entries = selected.sort(stable=True).indices[:length]
        highest = selected[entries[-1]]
        at_highest = selected[entries] == highest
        entries = torch.cat((entries[~at_highest].sort().values, entries[at_highest]))
        queue[:length] = entries.int()
        taken, usable = 0, torch.arange(length)
        marks.copy_(torch.tensor([0, length, now, int(highest)]))
    if count:
        marks[0] = taken + int(usable[count - 1]) + 1
    return entries[usable[:count]]


def _check_tokens(state: AdmitState, tokens: Tensor) -> None:
    context = state.page.shape[2]
    if tokens.numel() and int(tokens.max()) >= context:
        raise ValueError(f"token {int(tokens.max())} is beyond the state's context of {context} tokens")
