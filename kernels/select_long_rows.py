"""Device code of `select_tokens` (kernels/select.py): rows that several programs share.

Bracket the threshold by a sample (kernels/select_bracket.py), count against the bracket,
find the threshold in what lies inside it, write.
"""

from __future__ import annotations

from ds_offload.kernels.dependent_launch import follow, step_kernel
from ds_offload.kernels.select_row import (
    find_threshold,
    inner_keys,
    kept_flags,
    row_end,
    row_keep,
    row_keys,
    write_kept,
    write_rest,
)
from ds_offload.kernels.triton_runtime import jit, tl


@jit
def _classify(keys, counter, listed, top, bottom, LISTED: tl.constexpr):
    """A chunk's entries of `classify_kernel`'s table; its keys inside the bracket are listed."""
    above_top = tl.sum((keys > top).to(tl.int32) + ((keys >= top).to(tl.int32) << 16), 0)
    above = above_top & 0xFFFF
    to_top = above_top >> 16
    above_bottom = tl.sum((keys > bottom).to(tl.int32) + ((keys >= bottom).to(tl.int32) << 16), 0)
    found = (above_bottom & 0xFFFF) - to_top
    at_bottom = (above_bottom >> 16) - (above_bottom & 0xFFFF)
    if bottom >= top:
        found = above * 0
        at_bottom = above * 0
    place = above * 0
    if found > 0:
        place = tl.atomic_add(counter, found, sem="relaxed")
        # A list that overflows is not read.
        if place + found <= LISTED:
            inside = (keys > bottom) & (keys < top)
            tl.store(listed + place + tl.cumsum(inside.to(tl.int32), 0) - 1, keys, mask=inside)
    return above + ((to_top - above) << 16), found + (at_bottom << 16), place


@step_kernel(do_not_specialize=["last", "first", "length", "chunks"])
def classify_kernel(
    scores,
    last,
    state,
    table,
    listed,
    first,
    length,
    chunks,
    heads,
    LISTED: tl.constexpr,
    CHUNK: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    """One program per chunk of a row: count what is above, on and inside the bracket; list what is inside.

    table[row, :, chunk]: (above | at its top << 16), (inside | at its bottom << 16), place in the list.
    Chunks find their places in any order; nothing that is written to `out` depends on it.
    """
    follow()
    chunk = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    end = row_end(last, row, heads, length)
    top = tl.load(state + row * 8)
    bottom = tl.load(state + row * 8 + 1)
    start = chunk * CHUNK
    upper = start * 0
    lower = start * 0
    place = start * 0
    listed += row * LISTED
    # Most chunks lie within the candidates and need no masks: instructions are what takes the time.
    if (start >= first) & (start + CHUNK <= end):
        keys = inner_keys(scores, row, start, length, CHUNK, ALIGNMENT)
        upper, lower, place = _classify(keys, state + row * 8 + 2, listed, top, bottom, LISTED)
    elif (start < end) & (start + CHUNK > first):
        keys = row_keys(scores, row, start, first, end, length, CHUNK, ALIGNMENT)
        upper, lower, place = _classify(keys, state + row * 8 + 2, listed, top, bottom, LISTED)
    entry = table + row * 3 * chunks + chunk
    tl.store(entry, upper)
    tl.store(entry + chunks, lower)
    tl.store(entry + 2 * chunks, place)


@jit
def _search_row(scores, row, first, last, length, low, high, wanted, BLOCK: tl.constexpr, ALIGNMENT: tl.constexpr):
    """`find_threshold` over a whole row in memory."""
    while low < high:
        middle = (low & high) + ((low ^ high) >> 1)
        above = middle * 0
        for start in range(0, last, BLOCK):
            keys = row_keys(scores, row, start, first, last, length, BLOCK, ALIGNMENT)
            above += tl.sum((keys > middle).to(tl.int32), 0)
        if above > wanted:
            low = middle + 1
        else:
            high = middle
            if above == wanted:
                low = middle
    return low


@step_kernel(do_not_specialize=["last", "keep", "first", "length", "count", "chunks"])
def threshold_kernel(
    scores,
    last,
    keep,
    state,
    table,
    listed,
    first,
    length,
    count,
    chunks,
    heads,
    rows_per_keep,
    NONE: tl.constexpr,
    LISTED: tl.constexpr,
    CHUNK: tl.constexpr,
    WIDTH: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    """One program per row: its exact threshold, and what of each chunk's tokens comes before it.

    state[row, 3:7]: the threshold, how many that equal it are kept, how many are kept in all, how many equal it.
    table[row, :2, chunk]: tokens of earlier chunks above the threshold, and equal to it.
    """
    follow()
    row = tl.program_id(0).to(tl.int64)
    end = row_end(last, row, heads, length)
    wanted = row_keep(keep, row, rows_per_keep, count)
    top = tl.load(state + row * 8)
    bottom = tl.load(state + row * 8 + 1)
    entries = table + row * 3 * chunks
    rank = listed + row * LISTED
    above = wanted * 0
    to_top = wanted * 0
    inside = wanted * 0
    at_bottom = wanted * 0
    for block in range(0, chunks, WIDTH):
        chunk = block + tl.arange(0, WIDTH)
        upper = tl.load(entries + chunk, mask=chunk < chunks, other=0)
        lower = tl.load(entries + chunks + chunk, mask=chunk < chunks, other=0)
        above += tl.sum(upper & 0xFFFF, 0)
        to_top += tl.sum((upper & 0xFFFF) + (upper >> 16), 0)
        inside += tl.sum(lower & 0xFFFF, 0)
        at_bottom += tl.sum(lower >> 16, 0)

    threshold = top
    from_list = False
    at_top = (wanted >= above) & ((wanted <= to_top) | (top == NONE))
    if not at_top:
        listable = (wanted > to_top) & (wanted <= to_top + inside)
        past = wanted > to_top + inside
        if listable & (inside <= LISTED):
            index = tl.arange(0, LISTED)
            keys = tl.load(rank + index, mask=index < inside, other=-0x80000000)
            threshold = find_threshold(keys, bottom, top - 1, wanted - to_top)
            # Each chunk's part of the list lies together: its counts are differences of these.
            sums = tl.cumsum(kept_flags(keys, threshold), 0)
            tl.debug_barrier()
            tl.store(rank + index, sums, mask=index < inside)
            from_list = True
        elif past & ((wanted <= to_top + inside + at_bottom) | (bottom == NONE)):
            threshold = bottom
        else:
            # The sample was off, or too much is inside: search all of the row.
            low = bottom
            high = top
            if wanted < above:
                low = top + 1
                high = tl.full([], 0x7FFFFFFF, tl.int32)
            elif past:
                low = tl.full([], NONE, tl.int32)
                high = bottom - 1
            threshold = _search_row(scores, row, first, end, length, low, high, wanted, CHUNK, ALIGNMENT)
            for chunk in range(0, chunks):
                keys = row_keys(scores, row, chunk * CHUNK, first, end, length, CHUNK, ALIGNMENT)
                tl.store(entries + chunk, tl.sum(kept_flags(keys, threshold), 0))
            top = threshold
        # What the program has just written is read by other threads of it.
        tl.debug_barrier()

    above = wanted * 0
    equal = wanted * 0
    for block in range(0, chunks, WIDTH):
        chunk = block + tl.arange(0, WIDTH)
        upper = tl.load(entries + chunk, mask=chunk < chunks, other=0)
        lower = tl.load(entries + chunks + chunk, mask=chunk < chunks, other=0)
        chunk_above = upper & 0xFFFF
        chunk_equal = upper >> 16
        if from_list:
            place = tl.load(entries + 2 * chunks + chunk, mask=chunk < chunks, other=0)
            found = lower & 0xFFFF
            to_end = tl.load(rank + place + found - 1, mask=found > 0, other=0)
            to_begin = tl.load(rank + place - 1, mask=(found > 0) & (place > 0), other=0)
            # The sums may have wrapped; a chunk's difference fits.
            chunk_above += chunk_equal + ((to_end - to_begin) & 0xFFFF)
            chunk_equal = ((to_end - to_begin) >> 16) & 0xFFFF
        elif threshold != top:
            chunk_above += chunk_equal + (lower & 0xFFFF)
            chunk_equal = lower >> 16
        tl.debug_barrier()
        tl.store(entries + chunk, above + tl.cumsum(chunk_above, 0) - chunk_above, mask=chunk < chunks)
        tl.store(entries + chunks + chunk, equal + tl.cumsum(chunk_equal, 0) - chunk_equal, mask=chunk < chunks)
        above += tl.sum(chunk_above, 0)
        equal += tl.sum(chunk_equal, 0)
    ties = tl.where(threshold == NONE, 0, wanted - above)
    tl.store(state + row * 8 + 3, threshold)
    tl.store(state + row * 8 + 4, ties)
    tl.store(state + row * 8 + 5, above + ties)
    tl.store(state + row * 8 + 6, equal)


@step_kernel(do_not_specialize=["last", "first", "length", "count", "chunks"])
def write_kernel(
    scores,
    last,
    state,
    table,
    out,
    first,
    length,
    count,
    chunks,
    heads,
    CHUNK: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    """One program per chunk of a row: its kept tokens, and its share of the -1 behind the row's last."""
    follow()
    chunk = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    end = row_end(last, row, heads, length)
    start = chunk * CHUNK
    kept = tl.load(state + row * 8 + 5)
    if (start < end) & (start + CHUNK > first) & (kept > 0):
        threshold = tl.load(state + row * 8 + 3)
        ties = tl.load(state + row * 8 + 4)
        entry = table + row * 3 * chunks + chunk
        above = tl.load(entry)
        equal = tl.load(entry + chunks)
        equal_end = tl.load(entry + chunks + 1, mask=chunk + 1 < chunks, other=0)
        if chunk + 1 == chunks:
            equal_end = tl.load(state + row * 8 + 6)
        # Of the tokens that equal the threshold, nearly every chunk keeps all or none: no ranks among them then.
        if (start >= first) & (start + CHUNK <= end) & ((equal >= ties) | (equal_end <= ties)):
            keys = inner_keys(scores, row, start, length, CHUNK, ALIGNMENT)
            flags = (keys > tl.where(equal < ties, threshold - 1, threshold)).to(tl.int32)
            place = above + tl.minimum(equal, ties) + tl.cumsum(flags, 0) - 1
            token = (start + tl.arange(0, CHUNK)).to(tl.int64)
            tl.store(out + row * count + place, token, mask=flags > 0)
        else:
            keys = row_keys(scores, row, start, first, end, length, CHUNK, ALIGNMENT)
            write_kept(out, row, count, keys, start, threshold, ties, above, equal, CHUNK)
    write_rest(out, row, kept + chunk * CHUNK, chunks * CHUNK, count, CHUNK)
