"""Device code of `select_tokens` (kernels/select.py): the first of the four launches for rows that programs share."""

from __future__ import annotations

from ds_offload.kernels.dependent_launch import follow, step_kernel
from ds_offload.kernels.select_row import ordered, row_end, row_keep
from ds_offload.kernels.triton_runtime import jit, tl


@jit
def _find_bracket(keys, low, high, wanted_top, wanted_bottom, slack, SAMPLE: tl.constexpr):
    """Values top and bottom in [low, high], of each rank one as `find_threshold` finds, by bisection of both at once.

    Each search stops early once wanted - slack to `wanted` keys are above its value. A rank outside of the sample is
    not searched for: its value is an end of the range.
    """
    top_low = low
    top_high = high
    bottom_low = low
    bottom_high = high
    if wanted_top < 0:
        top_low = high
        wanted_top = wanted_top * 0
    if wanted_bottom >= SAMPLE:
        bottom_high = low
    while (top_low < top_high) | (bottom_low < bottom_high):
        top = (top_low & top_high) + ((top_low ^ top_high) >> 1)
        bottom = (bottom_low & bottom_high) + ((bottom_low ^ bottom_high) >> 1)
        both = tl.sum((keys > top).to(tl.int32) + ((keys > bottom).to(tl.int32) << 16), 0)
        above_top = both & 0xFFFF
        above_bottom = (both >> 16) & 0xFFFF
        # Of a search that has ended, this leaves both ends as they are.
        if above_top > wanted_top:
            top_low = top + 1
        else:
            top_high = top
            if above_top >= wanted_top - slack:
                top_low = top
        if above_bottom > wanted_bottom:
            bottom_low = bottom + 1
        else:
            bottom_high = bottom
            if above_bottom >= wanted_bottom - slack:
                bottom_low = bottom
    return top_low, bottom_low


@step_kernel(do_not_specialize=["last", "keep", "first", "length", "count"])
def bracket_kernel(
    scores,
    last,
    keep,
    state,
    first,
    length,
    count,
    heads,
    rows_per_keep,
    NONE: tl.constexpr,
    SAMPLE: tl.constexpr,
    SHIFT: tl.constexpr,
    LISTED: tl.constexpr,
):
    """One program per row: values that very likely enclose the threshold, from a sample.

    state[row]: the value above it, the one below it, and a counter set to 0.
    """
    follow()
    row = tl.program_id(0).to(tl.int64)
    end = row_end(last, row, heads, length)
    wanted = row_keep(keep, row, rows_per_keep, count)
    tokens = tl.maximum(end - first, 0)
    index = tl.arange(0, SAMPLE)
    slack = wanted * 0
    top = tl.full([], NONE, tl.int32)
    bottom = top
    if wanted < tokens:
        offset = index
        wanted_top = wanted
        wanted_bottom = wanted
        if tokens > SAMPLE:
            # One token of each of SAMPLE equal stretches, at a place that follows no period.
            jitter = (((index * 40503) & 0xFFFF).to(tl.int64) * (tokens >> SHIFT)) >> 16
            offset = (((index.to(tl.int64) * tokens) >> SHIFT) + jitter).to(tl.int32)
            rank = wanted.to(tl.float32) * SAMPLE / tokens.to(tl.float32)
            # The sample's count of kept tokens is binomial; a list that overflows would be worse than a miss.
            spread = 5.0 * tl.sqrt(tl.maximum(rank * (1.0 - rank / SAMPLE), 0.0)) + 3.0
            spread = tl.minimum(spread, 0.3 * LISTED * SAMPLE / tokens.to(tl.float32))
            slack = (spread * 0.25).to(tl.int32)
            wanted_top = tl.floor(rank - spread).to(tl.int32)
            wanted_bottom = tl.ceil(rank + spread).to(tl.int32) + slack
        live = offset < tokens
        values = tl.load(scores + row * length + first + offset, mask=live, other=0)
        keys = tl.where(live, ordered(values), -0x80000000)
        highest = tl.maximum(tl.max(keys, 0), top)
        found, bottom = _find_bracket(keys, top, highest, wanted_top, wanted_bottom, slack, SAMPLE)
        top = tl.where(wanted_top < 0, 0x7FFFFFFF, found)
    tl.store(state + row * 8, top)
    tl.store(state + row * 8 + 1, bottom)
    tl.store(state + row * 8 + 2, 0)
