"""Device code of `select_tokens` (kernels/select.py): a row's threshold, bracketed by a sample and searched for.

All of a program's threads take part, and hold the same values.
"""

from __future__ import annotations

from ds_offload.kernels.select_row import ordered_bits, row_keys
from ds_offload.kernels.triton_runtime import jit, tl


@jit
def count_two(keys, one, other):
    """How many of `keys`, fewer than 2 ** 15, are above each of two values: counted in one exchange between threads."""
    counts = tl.sum((keys > one).to(tl.int32) + ((keys > other).to(tl.int32) << 16), 0)
    return counts & 0xFFFF, counts >> 16


@jit
def search_list(keys, low, high, wanted):
    """`find_threshold` (kernels/select_row.py), by thirds."""
    while low < high:
        third = ((high - low).to(tl.uint32, bitcast=True) // 3).to(tl.int32, bitcast=True)
        one = low + third
        other = one + third
        above_one, above_other = count_two(keys, one, other)
        if above_one <= wanted:
            high = one
        elif above_other <= wanted:
            low = one + 1
            high = other
        else:
            low = other + 1
        if (above_one == wanted) | ((above_one > wanted) & (above_other == wanted)):
            low = high
    return low


@jit
def halve(low, middle, high, above, wanted, slack):
    """The half of [low, high] that `find_threshold` goes on with, `above` keys being above the middle."""
    lower = tl.where(above > wanted, middle + 1, tl.where(above >= wanted - slack, middle, low))
    upper = tl.where(above > wanted, high, middle)
    return tl.where(low < high, lower, low), tl.where(low < high, upper, high)


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
    fewest = wanted
    most = wanted
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
    live = offset < tokens
    values = tl.load(scores + row * length + first + offset, mask=live, other=float("-inf"))
    keys = tl.where(live, ordered_bits(values), -0x80000000)
    # Both ends by bisection, side by side. One that needs none begins as one value.
    top_low = tl.full([], MINUS_INF, tl.int32)
    low = top_low
    top = tl.maximum(tl.max(keys, 0), low)
    bottom = top
    if fewest < 0:
        top_low = tl.full([], 0x7FFFFFFF, tl.int32)
        top = top_low
    if wanted >= tokens:
        top = low
        top_low = low
        bottom = low
    if (tokens > SAMPLE) & (most >= SAMPLE):
        bottom = low
    while (top_low < top) | (low < bottom):
        one = (top_low & top) + ((top_low ^ top) >> 1)
        other = (low & bottom) + ((low ^ bottom) >> 1)
        above_one, above_other = count_two(keys, one, other)
        top_low, top = halve(top_low, one, top, above_one, fewest, slack)
        low, bottom = halve(low, other, bottom, above_other, most, slack)
    return top, bottom


@jit
def search_row(scores, row, first, last, length, low, high, wanted, BLOCK: tl.constexpr, ALIGNMENT: tl.constexpr):
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
