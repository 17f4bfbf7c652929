"""Device code of `select_tokens` (kernels/select.py): rows whose programs wait for each other in one launch.

A program holds four tokens of each of COLUMNS neighbouring columns in registers. All programs of a row bracket the
threshold by the same sample, count and list their own tokens, and meet; then each finds the same threshold in the
list, and writes its own tokens.

Nothing here hangs where fewer programs run at a time than were launched: a program takes its place in the order in
which programs start, so those of a row start one after the other and wait for nobody but each other. Of several such
launches at a time each has at most one row whose programs have not all started.
"""

from __future__ import annotations

from ds_offload.kernels.select_long_rows import search_row
from ds_offload.kernels.select_row import kept_flags, ordered_bits, row_end, row_keep, row_keys, write_rest
from ds_offload.kernels.triton_runtime import jit, tl


@jit
def column_keys(scores, row, start, first, last, length, COLUMNS: tl.constexpr, ALIGNMENT: tl.constexpr):
    """Ordered scores of 4 * COLUMNS tokens from `start` on: four [COLUMNS], neighbours in one column.

    Below MINUS_INF outside of [first, last).
    """
    token = start + 4 * tl.arange(0, COLUMNS)[:, None] + tl.arange(0, 4)[None, :]
    pointers = scores + row * length + token
    if ALIGNMENT == 16:
        # The length is a multiple of four; seeing that, the compiler loads as many at a time.
        inside = (start + 4 * tl.arange(0, COLUMNS))[:, None] < length
        values = tl.load(tl.multiple_of(pointers, [1, 16]), mask=inside, other=float("-inf"))
    else:
        values = tl.load(pointers, mask=token < length, other=float("-inf"))
    keys = tl.where((token >= first) & (token < last), ordered_bits(values), -0x80000000)
    even, odd = tl.split(tl.reshape(keys, [COLUMNS, 2, 2]))
    key0, key2 = tl.split(even)
    key1, key3 = tl.split(odd)
    return key0, key1, key2, key3


@jit
def search_keys(keys, low, high, wanted, slack):
    """`find_threshold` (kernels/select_row.py) for several values of `wanted` [Q] at a time, each in [low, high] [Q].

    `keys` [1, N], N below 2 ** 21. A round tries three values between, since most of its time is spent on the
    threads' exchange of counts. Where low = high nothing changes.
    """
    while tl.sum((low < high).to(tl.int32), 0) > 0:
        span = high.to(tl.int64) - low
        try1 = (low + (span >> 2)).to(tl.int32)
        try2 = (low + (span >> 1)).to(tl.int32)
        try3 = (low + ((3 * span) >> 2)).to(tl.int32)
        flags = (keys > try1[:, None]).to(tl.int64) + ((keys > try2[:, None]).to(tl.int64) << 21)
        counts = tl.sum(flags + ((keys > try3[:, None]).to(tl.int64) << 42), 1)
        above1 = (counts & 0x1FFFFF).to(tl.int32)
        above2 = ((counts >> 21) & 0x1FFFFF).to(tl.int32)
        above3 = (counts >> 42).to(tl.int32)
        fits1 = above1 <= wanted
        fits2 = above2 <= wanted
        fits3 = above3 <= wanted
        upper = tl.where(fits1, try1, tl.where(fits2, try2, tl.where(fits3, try3, high)))
        lower = tl.where(fits1, low, tl.where(fits2, try1 + 1, tl.where(fits3, try2 + 1, try3 + 1)))
        above = tl.where(fits1, above1, tl.where(fits2, above2, tl.where(fits3, above3, -0x40000000)))
        lower = tl.where(above >= wanted - slack, upper, lower)
        search = low < high
        high = tl.where(search, upper, high)
        low = tl.where(search, lower, low)
    return low


@jit
def bracket(
    scores,
    row,
    first,
    tokens,
    length,
    wanted,
    MINUS_INF: tl.constexpr,
    SAMPLE: tl.constexpr,
    SHIFT: tl.constexpr,
    LISTED: tl.constexpr,
):
    """Values that very likely enclose the threshold of a row's `tokens` candidates, from a sample: top, bottom."""
    index = tl.arange(0, SAMPLE)
    below = tl.arange(0, 2)
    targets = tl.zeros([2], tl.int32) + wanted
    slack = wanted * 0
    offset = index
    if tokens > SAMPLE:
        # One token of each of SAMPLE equal stretches, at a place that follows no period.
        jitter = (((index * 40503) & 0xFFFF).to(tl.int64) * (tokens >> SHIFT)) >> 16
        offset = (((index.to(tl.int64) * tokens) >> SHIFT) + jitter).to(tl.int32)
        rank = wanted.to(tl.float32) * SAMPLE / tokens.to(tl.float32)
        # The sample's count of kept tokens is binomial; a list that overflows would be worse than a miss.
        spread = 5.0 * tl.sqrt(tl.maximum(rank * (1.0 - rank / SAMPLE), 0.0)) + 3.0
        spread = tl.minimum(spread, 0.3 * LISTED * SAMPLE / tokens.to(tl.float32))
        slack = (spread * 0.25).to(tl.int32)
        fewest = tl.floor(rank - spread).to(tl.int32)
        most = tl.ceil(rank + spread).to(tl.int32) + slack
        targets = tl.where(below == 0, fewest, most)
    live = offset < tokens
    values = tl.load(scores + row * length + first + offset, mask=live, other=float("-inf"))
    keys = tl.where(live, ordered_bits(values), -0x80000000)
    # Ends that need no search: all candidates are kept, or the sample has too few that are above.
    low = tl.full([2], MINUS_INF, tl.int32)
    high = tl.maximum(low, tl.max(keys, 0))
    low = tl.where(targets < 0, 0x7FFFFFFF, low)
    high = tl.where(targets < 0, 0x7FFFFFFF, high)
    everything = (wanted >= tokens) | ((tokens > SAMPLE) & (targets >= SAMPLE))
    low = tl.where(everything, MINUS_INF, low)
    high = tl.where(everything, MINUS_INF, high)
    found = search_keys(keys[None, :], low, high, targets, slack)
    return tl.sum(tl.where(below == 0, found, 0), 0), tl.sum(tl.where(below == 1, found, 0), 0)


@jit
def meet(arrived, parts):
    """Wait until all `parts` programs of a row are here; behind it each may read what any wrote before it."""
    tl.debug_barrier()
    tl.atomic_add(arrived, 1, sem="acq_rel")
    while tl.atomic_add(arrived, 0, sem="acquire") < parts:
        pass
    tl.debug_barrier()


@jit
def count_row(scores, row, threshold, start, first, last, length, BLOCK: tl.constexpr, ALIGNMENT: tl.constexpr):
    """Tokens of a row above `threshold`; those of them before `start`; those equal to it before `start`."""
    above = start * 0
    above_before = start * 0
    equal_before = start * 0
    for block in range(0, last, BLOCK):
        keys = row_keys(scores, row, block, first, last, length, BLOCK, ALIGNMENT)
        more = tl.sum((keys > threshold).to(tl.int32), 0)
        above += more
        if block < start:
            above_before += more
            equal_before += tl.sum((keys == threshold).to(tl.int32), 0)
    return above, above_before, equal_before


@jit(do_not_specialize=["last", "keep", "first", "length", "count", "rows", "parts"])
def row_parts_kernel(
    scores,
    last,
    keep,
    out,
    turns,
    table,
    listed,
    first,
    length,
    count,
    heads,
    rows_per_keep,
    rows,
    parts,
    MINUS_INF: tl.constexpr,
    SAMPLE: tl.constexpr,
    SHIFT: tl.constexpr,
    LISTED: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS_PAD: tl.constexpr,
    STAGE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    """One program per part of 4 * COLUMNS tokens of a row. STAGE 0 does all; 1 ends before the meeting, 2 begins there.

    turns[row]: 0 before and after: programs that arrived, that left, and scores in the list;
    turns[rows, 0]: programs that started.
    table[row, :, part]: tokens above the bracket's top and equal to it, inside, equal to the bottom; top, bottom.
    listed[row]: scores inside the bracket, and below them the part of each. Their order is any; what is counted
    among them does not depend on it.
    """
    program = tl.program_id(0)
    if STAGE == 0:
        program = tl.atomic_add(turns + rows * 4, 1, sem="relaxed")
        if program == tl.num_programs(0) - 1:
            tl.store(turns + rows * 4, 0)
    row = (program // parts).to(tl.int64)
    part = program % parts
    turns += row * 4
    entries = table + row * 6 * parts
    listed += row * 2 * LISTED
    end = row_end(last, row, heads, length)
    wanted = row_keep(keep, row, rows_per_keep, count)
    start = part * (4 * COLUMNS)
    keys = column_keys(scores, row, start, first, end, length, COLUMNS, ALIGNMENT)
    if STAGE == 2:
        top = tl.load(entries + 4 * parts + part)
        bottom = tl.load(entries + 5 * parts + part)
    else:
        tokens = tl.maximum(end - first, 0)
        top, bottom = bracket(scores, row, first, tokens, length, wanted, MINUS_INF, SAMPLE, SHIFT, LISTED)
        upper = tl.zeros([COLUMNS], tl.int32)
        lower = tl.zeros([COLUMNS], tl.int32)
        for t in tl.static_range(4):
            upper += kept_flags(keys[t], top)
            lower += ((keys[t] > bottom) & (keys[t] < top)).to(tl.int32)
            lower += ((keys[t] == bottom) & (bottom < top)).to(tl.int32) << 16
        sums = tl.sum(upper.to(tl.int64) + (lower.to(tl.int64) << 32), 0)
        inside = ((sums >> 32) & 0xFFFF).to(tl.int32)
        tl.store(entries + part, (sums & 0xFFFF).to(tl.int32))
        tl.store(entries + parts + part, ((sums >> 16) & 0xFFFF).to(tl.int32))
        tl.store(entries + 2 * parts + part, inside)
        tl.store(entries + 3 * parts + part, ((sums >> 48) & 0xFFFF).to(tl.int32))
        tl.store(entries + 4 * parts + part, top)
        tl.store(entries + 5 * parts + part, bottom)
        if inside > 0:
            here = lower & 0xFFFF
            index = tl.atomic_add(turns + 2, inside, sem="relaxed") + tl.cumsum(here, 0) - here
            for t in tl.static_range(4):
                within = (keys[t] > bottom) & (keys[t] < top)
                tl.store(listed + index, keys[t], mask=within & (index < LISTED))
                tl.store(listed + LISTED + index, tl.zeros_like(index) + part, mask=within & (index < LISTED))
                index += within.to(tl.int32)

    if STAGE != 1:
        if STAGE == 0:
            meet(turns, parts)
        each = tl.arange(0, PARTS_PAD)
        some = each < parts
        before = each < part
        # Others wrote these: not what this multiprocessor may still have of them.
        above_top = tl.load(entries + each, mask=some, other=0, cache_modifier=".cg")
        at_top = tl.load(entries + parts + each, mask=some, other=0, cache_modifier=".cg")
        inside = tl.load(entries + 2 * parts + each, mask=some, other=0, cache_modifier=".cg")
        at_bottom = tl.load(entries + 3 * parts + each, mask=some, other=0, cache_modifier=".cg")
        above = tl.sum(above_top, 0)
        above_before = tl.sum(tl.where(before, above_top, 0), 0)
        equal_before = tl.sum(tl.where(before, at_top, 0), 0)
        to_top = above + tl.sum(at_top, 0)
        to_inside = to_top + tl.sum(inside, 0)
        to_bottom = to_inside + tl.sum(at_bottom, 0)
        threshold = top
        if (wanted < above) | ((wanted > to_top) & (top > MINUS_INF)):
            if (wanted > to_top) & (wanted <= to_inside) & (to_inside - to_top <= LISTED):
                index = tl.arange(0, LISTED)
                listing = index < to_inside - to_top
                among = tl.load(listed + index, mask=listing, other=-0x80000000, cache_modifier=".cg")
                one = tl.zeros([1], tl.int32)
                found = search_keys(among[None, :], one + bottom, one + (top - 1), one + (wanted - to_top), 0)
                threshold = tl.sum(found, 0)
                earlier = tl.load(listed + LISTED + index, mask=listing, other=parts, cache_modifier=".cg") < part
                flags = kept_flags(among, threshold)
                counts = flags.to(tl.int64) + (tl.where(earlier, flags, 0).to(tl.int64) << 32)
                counts = tl.sum(counts, 0)
                above = to_top + (counts & 0xFFFF).to(tl.int32)
                above_before += equal_before + ((counts >> 32) & 0xFFFF).to(tl.int32)
                equal_before = ((counts >> 48) & 0xFFFF).to(tl.int32)
            elif (wanted > to_inside) & ((wanted <= to_bottom) | (bottom == MINUS_INF)):
                threshold = bottom
                above = to_inside
                above_before += equal_before + tl.sum(tl.where(before, inside, 0), 0)
                equal_before = tl.sum(tl.where(before, at_bottom, 0), 0)
            else:
                # The sample was off, or too much is inside: every program searches all of the row.
                low = bottom
                high = top
                if wanted < above:
                    low = top + 1
                    high = tl.full([], 0x7FFFFFFF, tl.int32)
                elif wanted > to_inside:
                    low = tl.full([], MINUS_INF, tl.int32)
                    high = bottom - 1
                threshold = search_row(scores, row, first, end, length, low, high, wanted, COLUMNS, ALIGNMENT)
                above, above_before, equal_before = count_row(
                    scores, row, threshold, start, first, end, length, COLUMNS, ALIGNMENT
                )
        ties = tl.where(threshold == MINUS_INF, 0, wanted - above)

        flags = kept_flags(keys[0], threshold) + kept_flags(keys[1], threshold)
        flags += kept_flags(keys[2], threshold) + kept_flags(keys[3], threshold)
        ranks = tl.cumsum(flags, 0) - flags
        above_rank = above_before + (ranks & 0xFFFF)
        equal_rank = equal_before + ((ranks >> 16) & 0xFFFF)
        token = start + 4 * tl.arange(0, COLUMNS)
        for t in tl.static_range(4):
            more = keys[t] > threshold
            same = keys[t] == threshold
            place = out + row * count + (above_rank + tl.minimum(equal_rank, ties))
            tl.store(place, (token + t).to(tl.int64), mask=more | (same & (equal_rank < ties)))
            above_rank += more.to(tl.int32)
            equal_rank += same.to(tl.int32)
        write_rest(out, row, above + ties + part * 1024, parts * 1024, count, 1024)

        if tl.atomic_add(turns + 1, 1, sem="relaxed") == parts - 1:
            # All have met and none will come again.
            tl.store(turns + tl.arange(0, 4), tl.zeros([4], tl.int32))
