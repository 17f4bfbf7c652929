"""The Triton kernel of the admission (kernels/admit.py): every token looked up, then the missing ones settled.

Several programs look up a row's tokens. The one that is done last settles what is missing, and reads what the others
wrote past its own cache.
"""

from __future__ import annotations

from ds_offload.kernels.triton_runtime import jit, tl


@jit
def _list_slots(selected, queue, marks, length, now, capacity, BINS: tl.constexpr, TILE: tl.constexpr):
    """Fill the queue of a row with the `length` slots of the lowest stamps, `now` not among them."""
    lane = tl.arange(0, TILE)
    each = tl.arange(0, BINS)
    # The stamp of the last slot listed: slots are counted by stamp from the last list's highest on. Those below
    # it that are left of that list are fewer than `length`.
    base = tl.load(marks + 3)
    lower = tl.zeros([TILE], tl.int32)
    histogram = tl.zeros([BINS], tl.int32)
    for first in range(0, capacity, TILE):
        inside = first + lane < capacity
        age = tl.load(selected + first + lane, mask=inside, other=now, cache_modifier=".cg") - base
        lower += (inside & (age < 0)).to(tl.int32)
        # Whatever is outside the counted range falls into the last bin.
        counted = inside & (age >= 0) & (age < BINS - 1)
        histogram += tl.histogram(tl.where(counted, age, BINS - 1), BINS)
    below = tl.sum(lower, 0)
    slots_at = tl.where(each < BINS - 1, histogram, 0)
    while below + tl.sum(slots_at, 0) < length:
        # The stamps of the next range.
        below += tl.sum(slots_at, 0)
        base += BINS - 1
        histogram = tl.zeros([BINS], tl.int32)
        for first in range(0, capacity, TILE):
            inside = first + lane < capacity
            age = tl.load(selected + first + lane, mask=inside, other=now, cache_modifier=".cg") - base
            counted = inside & (age >= 0) & (age < BINS - 1)
            histogram += tl.histogram(tl.where(counted, age, BINS - 1), BINS)
        slots_at = tl.where(each < BINS - 1, histogram, 0)
    reach = below + tl.cumsum(slots_at, 0)
    short = reach < length
    threshold = base + tl.sum(short.to(tl.int32), 0)
    below = tl.maximum(below, tl.max(tl.where(short, reach, 0), 0))
    tl.store(marks + 3, threshold)

    # Those below the threshold all belong to the list, and come first; of those at it, the lowest slots.
    lower_before = 0
    equal_before = below
    for first in range(0, capacity, TILE):
        slot = first + lane
        stamp = tl.load(selected + slot, mask=slot < capacity, other=now, cache_modifier=".cg")
        less = stamp < threshold
        equal = stamp == threshold
        # Both counts of a tile fit one number: the scan is the dearest part.
        both = less.to(tl.int32) + (equal.to(tl.int32) << 16)
        before = tl.cumsum(both, 0) - both
        rank = equal_before + (before >> 16)
        tl.store(queue + lower_before + (before & 0xFFFF), slot, mask=less)
        tl.store(queue + rank, slot, mask=equal & (rank < length))
        total = tl.sum(both, 0)
        lower_before += total & 0xFFFF
        equal_before += total >> 16


@jit
def _pop_slots(selected, queue, marks, victims, misses, now, TILE: tl.constexpr):
    """Put the first `misses` entries of the queue that were not selected since into `victims`; how many there were."""
    lane = tl.arange(0, TILE)
    front = tl.load(marks)
    listed = tl.load(marks + 1)
    listed_at = tl.load(marks + 2)
    taken = front
    found = misses * 0
    while (found < misses) & (front < listed):
        i = front + lane
        slot = tl.load(queue + i, mask=i < listed, other=0)
        stamp = tl.load(selected + slot, mask=i < listed, other=now, cache_modifier=".cg")
        usable = (i < listed) & (stamp < listed_at)
        ones = usable.to(tl.int32)
        rank = found + tl.cumsum(ones, 0) - ones
        victim = usable & (rank < misses)
        tl.store(victims + rank, slot, mask=victim)
        taken = tl.maximum(taken, tl.max(tl.where(victim, i + 1, 0), 0))
        found += tl.sum(ones, 0)
        front += TILE
    if found >= misses:
        tl.store(marks, taken)
    return found


@jit
def _settle(
    page,
    held,
    selected,
    queue,
    marks,
    tokens,
    now,
    places,
    missing,
    missing_places,
    missed,
    victims,
    some,
    misses,
    hits,
    capacity,
    first_place,
    listed_least,
    parts,
    PART: tl.constexpr,
    PARTS_PAD: tl.constexpr,
    TILE: tl.constexpr,
    LIST_TILE: tl.constexpr,
    BINS: tl.constexpr,
):
    """Give a row's missing tokens their slots; `some` [PARTS_PAD] are missing in each part. Threads exchange data."""
    each = tl.arange(0, PARTS_PAD)
    if _pop_slots(selected, queue, marks, victims, misses, now, TILE) < misses:
        # Too few are left: list anew. Every thread has read the old marks.
        tl.debug_barrier()
        length = tl.minimum(tl.maximum(misses, listed_least), capacity - hits)
        _list_slots(selected, queue, marks, length, now, capacity, BINS, LIST_TILE)
        tl.store(marks, 0)
        tl.store(marks + 1, length)
        tl.store(marks + 2, now)
        tl.debug_barrier()
        _pop_slots(selected, queue, marks, victims, misses, now, TILE)
    tl.debug_barrier()
    ends = tl.cumsum(some, 0)
    for first in range(0, misses, TILE):
        i = first + tl.arange(0, TILE)
        live = i < misses
        # The part that lists the i-th missing token, and the missing tokens of the parts before it.
        before = (ends[None, :] <= i[:, None]) & (each < parts)[None, :]
        part = tl.sum(before.to(tl.int32), 1)
        rank = i - tl.sum(tl.where(before, some[None, :], 0), 1)
        index = tl.load(missed + part * PART + rank, mask=live, other=0, cache_modifier=".cg")
        token = tl.load(tokens + index, mask=live, other=0)
        slot = tl.load(victims + i, mask=live, other=0)
        left = tl.load(held + slot, mask=live, other=-1)
        place = (slot + first_place).to(tl.int64)
        tl.store(page + left, -1, mask=live & (left >= 0))
        tl.store(page + token, slot, mask=live)
        tl.store(held + slot, token.to(tl.int32), mask=live)
        tl.store(selected + slot, now, mask=live)
        tl.store(missing + i, token, mask=live)
        tl.store(missing_places + i, place, mask=live)
        tl.store(places + index, place, mask=live)


@jit(do_not_specialize=["places_stride", "context", "capacity", "kept", "first_place", "listed_least"])
def admit_kernel(
    page,
    held,
    selected,
    queue,
    marks,
    tokens,
    clock,
    recent,
    places,
    missing,
    missing_places,
    moved,
    counts,
    missed,
    victims,
    sums,
    places_stride,
    context,
    capacity,
    kept,
    first_place,
    listed_least,
    COUNTED: tl.constexpr,
    ATTENDED: tl.constexpr,
    PART: tl.constexpr,
    PARTS_PAD: tl.constexpr,
    TILE: tl.constexpr,
    LIST_TILE: tl.constexpr,
    BINS: tl.constexpr,
):
    """One program looks up one part of a row's tokens and stamps the slots of those found; the last one settles.

    missed[row, part * PART:]: indices of the part's missing tokens, ascending.
    sums[row, :, part]: missing, all, and recently selected tokens.
    """
    part = tl.program_id(0)
    parts = tl.num_programs(0)
    row = tl.program_id(1).to(tl.int64)
    page += row * context
    selected += row * capacity
    marks += row * 5
    tokens += row * kept
    places += row * places_stride
    missed += row * parts * PART
    sums += row * 3 * parts
    i = part * PART + tl.arange(0, PART)
    token = tl.load(tokens + i, mask=i < kept, other=-1)
    wanted = (token >= 0) & (token < context)
    slot = tl.load(page + token, mask=wanted, other=-1).to(tl.int32)
    hit = wanted & (slot >= 0)
    now = tl.load(clock)
    stamp = tl.load(selected + slot, mask=hit, other=0)
    tl.store(selected + slot, now, mask=hit)
    # Misses get their places when they are settled.
    tl.store(places + i, tl.where(hit, slot + first_place, -1).to(tl.int64), mask=i < kept)
    miss = wanted & (slot < 0)
    ones = miss.to(tl.int32)
    rank = tl.cumsum(ones, 0) - ones
    tl.store(missed + part * PART + rank, i, mask=miss)
    tl.store(sums + part, tl.sum(ones, 0))
    tl.store(sums + parts + part, tl.sum(wanted.to(tl.int32), 0))
    tl.store(sums + 2 * parts + part, tl.sum((hit & (stamp >= tl.load(recent))).to(tl.int32), 0))

    # Behind the barrier everything above is written; behind the count, everything of those that counted before.
    tl.debug_barrier()
    if tl.atomic_add(marks + 4, 1, sem="acq_rel") == parts - 1:
        tl.store(marks + 4, 0)
        each = tl.arange(0, PARTS_PAD)
        some = tl.load(sums + each, mask=each < parts, other=0, cache_modifier=".cg")
        misses = tl.sum(some, 0)
        wanted_all = tl.sum(tl.load(sums + parts + each, mask=each < parts, other=0, cache_modifier=".cg"), 0)
        tl.store(moved + row, misses)
        if COUNTED:
            again = tl.sum(tl.load(sums + 2 * parts + each, mask=each < parts, other=0, cache_modifier=".cg"), 0)
            kind = tl.arange(0, 4)
            gained = tl.where(kind == 0, misses, 0)
            if ATTENDED:
                gained = tl.where(kind == 1, wanted_all, gained)
                gained = tl.where(kind == 2, wanted_all - misses, gained)
                gained = tl.where(kind == 3, again, gained)
            totals = counts + (row * 4 + kind)
            tl.store(totals, tl.load(totals) + gained)
        if misses > 0:
            _settle(
                *(page, held + row * capacity, selected, queue + row * capacity, marks, tokens, now, places),
                *(missing + row * kept, missing_places + row * kept, missed, victims + row * parts * PART),
                *(some, misses, wanted_all - misses, capacity, first_place, listed_least, parts),
                *(PART, PARTS_PAD, TILE, LIST_TILE, BINS),
            )
