"""The Triton kernels of the admission (kernels/admit.py): every token looked up, then the missing ones settled."""

from __future__ import annotations

from ds_offload.kernels.dependent_launch import follow, step_kernel
from ds_offload.kernels.gather_kernels import counter
from ds_offload.kernels.triton_runtime import jit, tl


@step_kernel(do_not_specialize=["places_stride", "context", "capacity", "kept", "first_place"])
def look_up_kernel(
    page,
    selected,
    tokens,
    clock,
    recent,
    places,
    missed,
    sums,
    places_stride,
    context,
    capacity,
    kept,
    first_place,
    PART: tl.constexpr,
):
    """One program looks up one part of a row's tokens and stamps the slots of those found.

    missed[row, part * PART:]: indices of the part's missing tokens, ascending.
    sums[row, :, part]: missing, all, and recently selected tokens.
    """
    follow()
    part = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    page += row * context
    selected += row * capacity
    i = part * PART + tl.arange(0, PART)
    token = tl.load(tokens + row * kept + i, mask=i < kept, other=-1)
    wanted = (token >= 0) & (token < context)
    slot = tl.load(page + token, mask=wanted, other=-1).to(tl.int32)
    hit = wanted & (slot >= 0)
    now = tl.load(clock)
    stamp = tl.load(selected + slot, mask=hit, other=0)
    tl.store(selected + slot, now, mask=hit)
    # Misses get their places when they are settled.
    tl.store(places + row * places_stride + i, tl.where(hit, slot + first_place, -1).to(tl.int64), mask=i < kept)
    miss = wanted & (slot < 0)
    ones = miss.to(tl.int32)
    rank = tl.cumsum(ones, 0) - ones
    tl.store(missed + (row * tl.num_programs(0) + part) * PART + rank, i, mask=miss)
    sums += row * 3 * tl.num_programs(0) + part
    tl.store(sums, tl.sum(ones, 0))
    tl.store(sums + tl.num_programs(0), tl.sum(wanted.to(tl.int32), 0))
    tl.store(sums + 2 * tl.num_programs(0), tl.sum((hit & (stamp >= tl.load(recent))).to(tl.int32), 0))


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
        age = tl.load(selected + first + lane, mask=inside, other=now) - base
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
            age = tl.load(selected + first + lane, mask=first + lane < capacity, other=now) - base
            counted = (first + lane < capacity) & (age >= 0) & (age < BINS - 1)
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
        stamp = tl.load(selected + slot, mask=slot < capacity, other=now)
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
        stamp = tl.load(selected + slot, mask=i < listed, other=now)
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
def _find_part(missed_of, i, parts, SLICE: tl.constexpr):
    """The part that lists each of the missing tokens `i`, and its place there: SLICE parts at a time.

    All parts of a long selection at once would need more registers than there are, or a larger tile than Triton has.
    """
    part = i * 0
    rank = i
    passed = parts * 0
    for first in range(0, parts, SLICE):
        each = first + tl.arange(0, SLICE)
        some = tl.load(missed_of + each, mask=each < parts, other=0)
        before = (passed + tl.cumsum(some, 0)[None, :] <= i[:, None]) & (each < parts)[None, :]
        part += tl.sum(before.to(tl.int32), 1)
        rank -= tl.sum(tl.where(before, some[None, :], 0), 1)
        passed += tl.sum(some, 0)
    return part, rank


@step_kernel(do_not_specialize=["places_stride", "context", "capacity", "kept", "first_place", "listed_least", "parts"])
def settle_kernel(
    page,
    held,
    selected,
    queue,
    marks,
    tokens,
    clock,
    places,
    missing,
    missing_places,
    moved,
    progress,
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
    parts,
    COUNTED: tl.constexpr,
    ATTENDED: tl.constexpr,
    PART: tl.constexpr,
    PARTS_PAD: tl.constexpr,
    SLICE: tl.constexpr,
    TILE: tl.constexpr,
    LIST_TILE: tl.constexpr,
    BINS: tl.constexpr,
):
    """One program gives the missing tokens of one row their slots. Its threads exchange data through memory."""
    follow()
    row = tl.program_id(0).to(tl.int64)
    page += row * context
    held += row * capacity
    selected += row * capacity
    queue += row * capacity
    marks += row * 4
    tokens += row * kept
    places += row * places_stride
    missing += row * kept
    missing_places += row * kept
    missed += row * parts * PART
    victims += row * parts * PART
    now = tl.load(clock)
    each = tl.arange(0, PARTS_PAD)
    missed_of = sums + row * 3 * parts
    sums = missed_of + each
    some = tl.load(sums, mask=each < parts, other=0)
    wanted = tl.sum(tl.load(sums + parts, mask=each < parts, other=0), 0)
    misses = tl.sum(some, 0)
    tl.store(counter(progress, row), 0)
    tl.store(counter(progress, tl.num_programs(0)), 0)
    if COUNTED:
        counts += row * 4
        tl.store(counts, tl.load(counts) + misses)
        if ATTENDED:
            again = tl.sum(tl.load(sums + 2 * parts, mask=each < parts, other=0), 0)
            tl.store(counts + 1, tl.load(counts + 1) + wanted)
            tl.store(counts + 2, tl.load(counts + 2) + wanted - misses)
            tl.store(counts + 3, tl.load(counts + 3) + again)

    if misses > 0:
        found = _pop_slots(selected, queue, marks, victims, misses, now, TILE)
        if found < misses:
            # Too few are left: list anew. Every thread has read the old marks.
            tl.debug_barrier()
            length = tl.minimum(tl.maximum(misses, listed_least), capacity - (wanted - misses))
            _list_slots(selected, queue, marks, length, now, capacity, BINS, LIST_TILE)
            tl.store(marks, 0)
            tl.store(marks + 1, length)
            tl.store(marks + 2, now)
            tl.debug_barrier()
            found = _pop_slots(selected, queue, marks, victims, misses, now, TILE)
        # Fewer than are missing only where stamps were not as they should be: a slot that was not found is not written.
        misses = tl.minimum(misses, found)
        tl.debug_barrier()
        ends = tl.cumsum(some, 0)
        for first in range(0, misses, TILE):
            i = first + tl.arange(0, TILE)
            live = i < misses
            # The part that lists the i-th missing token, and the missing tokens of the parts before it.
            if PARTS_PAD <= SLICE:
                before = (ends[None, :] <= i[:, None]) & (each < parts)[None, :]
                part = tl.sum(before.to(tl.int32), 1)
                rank = i - tl.sum(tl.where(before, some[None, :], 0), 1)
            else:
                part, rank = _find_part(missed_of, i, parts, SLICE)
            index = tl.load(missed + part * PART + rank, mask=live, other=0)
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
    tl.store(moved + row, misses)
