"""Device code of `select_tokens` (kernels/select.py): rows whose programs wait for each other in one launch.

All programs of a row bracket its threshold by the same sample, each counts and lists its own tokens, and they meet;
then each finds the same threshold in the list, and writes its own tokens. A part is four blocks of neighbouring
columns of four tokens: a thread reads a column at once, and ranks are counted by column.

Nothing here hangs where fewer programs run at a time than were launched: a program takes its place in the order in
which programs start, so those of a row start one after the other and wait for nobody but each other. Of several such
launches at a time each has at most one row whose programs have not all started.
"""

from __future__ import annotations

from ds_offload.kernels.select_row import kept_flags, ordered_bits, row_end, row_keep, write_rest
from ds_offload.kernels.select_threshold import bracket, count_row, search_list, search_row
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
def part_keys(scores, row, start, first, last, length, COLUMNS: tl.constexpr, ALIGNMENT: tl.constexpr):
    """`column_keys` of the four blocks of a part, one after the other in one tuple."""
    keys = column_keys(scores, row, start, first, last, length, COLUMNS, ALIGNMENT)
    for block in tl.static_range(1, 4):
        keys = keys + column_keys(scores, row, start + block * 4 * COLUMNS, first, last, length, COLUMNS, ALIGNMENT)
    return keys


@jit
def meet(arrived, parts):
    """Wait until all `parts` programs of a row are here; behind it each may read what any wrote before it."""
    tl.debug_barrier()
    tl.atomic_add(arrived, 1, sem="acq_rel")
    while tl.atomic_add(arrived, 0, sem="acquire") < parts:
        pass
    tl.debug_barrier()


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
    PART: tl.constexpr,
    PARTS_PAD: tl.constexpr,
    STAGE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    """One program per PART tokens of a row. STAGE 0 does all; 1 ends before the meeting, 2 begins there.

    turns[row]: 0 before and after: programs that arrived, that left, and scores in the list;
    turns[rows, 0]: programs that started.
    table[row, :, part]: tokens above the bracket's top and equal to it, inside, equal to the bottom; top, bottom.
    listed[row]: scores inside the bracket, and below them the part of each. Their order is any; what is counted
    among them does not depend on it.
    """
    COLUMNS: tl.constexpr = PART // 16
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
    start = part * PART
    if STAGE == 2:
        top = tl.load(entries + 4 * parts + part)
        bottom = tl.load(entries + 5 * parts + part)
    else:
        tokens = tl.maximum(end - first, 0)
        top, bottom = bracket(scores, row, first, tokens, length, wanted, MINUS_INF, SAMPLE, SHIFT, LISTED)
        keys = part_keys(scores, row, start, first, end, length, COLUMNS, ALIGNMENT)
        upper = tl.zeros([COLUMNS], tl.int32)
        lower = tl.zeros([COLUMNS], tl.int32)
        for t in tl.static_range(16):
            upper += kept_flags(keys[t], top)
            lower += kept_flags(keys[t], bottom)
        above = tl.sum(upper, 0)
        at_top = (above >> 16) & 0xFFFF
        above = above & 0xFFFF
        inside = tl.sum(lower, 0)
        at_bottom = (inside >> 16) & 0xFFFF
        inside = (inside & 0xFFFF) - above - at_top
        if bottom == top:
            inside = 0
            at_bottom = 0
        tl.store(entries + part, above)
        tl.store(entries + parts + part, at_top)
        tl.store(entries + 2 * parts + part, inside)
        tl.store(entries + 3 * parts + part, at_bottom)
        tl.store(entries + 4 * parts + part, top)
        tl.store(entries + 5 * parts + part, bottom)
        if inside > 0:
            here = (lower & 0xFFFF) - (upper & 0xFFFF) - (upper >> 16)
            index = tl.atomic_add(turns + 2, inside, sem="relaxed") + tl.cumsum(here, 0) - here
            for t in tl.static_range(16):
                # In unsigned numbers, so that none of the comparisons above is kept in a register until here.
                within = (keys[t] - bottom).to(tl.uint32, bitcast=True) - 1 < (top - bottom).to(tl.uint32) - 1
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
                threshold = search_list(among, bottom, top - 1, wanted - to_top)
                earlier = tl.load(listed + LISTED + index, mask=listing, other=parts, cache_modifier=".cg") < part
                flags = kept_flags(among, threshold)
                above = to_top + (tl.sum(flags, 0) & 0xFFFF)
                before_part = tl.sum(tl.where(earlier, flags, 0), 0)
                above_before += equal_before + (before_part & 0xFFFF)
                equal_before = (before_part >> 16) & 0xFFFF
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
                threshold = search_row(scores, row, first, end, length, low, high, wanted, PART // 2, ALIGNMENT)
                above, above_before, equal_before = count_row(
                    scores, row, threshold, start, first, end, length, PART // 2, ALIGNMENT
                )
        ties = tl.where(threshold == MINUS_INF, 0, wanted - above)

        # Read again: held until here, they would be moved out of registers and back, for longer than this takes.
        keys = part_keys(scores, row, start, first, end, length, COLUMNS, ALIGNMENT)
        for block in tl.static_range(4):
            flags = kept_flags(keys[4 * block], threshold) + kept_flags(keys[4 * block + 1], threshold)
            flags += kept_flags(keys[4 * block + 2], threshold) + kept_flags(keys[4 * block + 3], threshold)
            ranks = tl.cumsum(flags, 0) - flags
            above_rank = above_before + (ranks & 0xFFFF)
            equal_rank = equal_before + (ranks >> 16)
            token = start + block * 4 * COLUMNS + 4 * tl.arange(0, COLUMNS)
            for t in tl.static_range(4):
                more = keys[4 * block + t] > threshold
                same = keys[4 * block + t] == threshold
                place = out + row * count + (above_rank + tl.minimum(equal_rank, ties))
                tl.store(place, (token + t).to(tl.int64), mask=more | (same & (equal_rank < ties)))
                above_rank += more.to(tl.int32)
                equal_rank += same.to(tl.int32)
            if block < 3:
                total = tl.sum(flags, 0)
                above_before += total & 0xFFFF
                equal_before += total >> 16
        write_rest(out, row, above + ties + part * 1024, parts * 1024, count, 1024)

        if tl.atomic_add(turns + 1, 1, sem="relaxed") == parts - 1:
            # All have met and none will come again.
            tl.store(turns + tl.arange(0, 4), tl.zeros([4], tl.int32))
