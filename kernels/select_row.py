"""Device code of `select_tokens` (kernels/select.py): the parts all rows share, and rows that one program holds."""

from __future__ import annotations

from ds_offload.kernels.dependent_launch import follow, step_kernel
from ds_offload.kernels.triton_runtime import jit, tl


@jit
def ordered(scores):
    """Scores as int32 of the same order: float32 by its bits, negative ones by their flipped magnitude."""
    if scores.dtype == tl.int16:
        return scores.to(tl.int32)
    else:  # noqa: RET505 - the branch is chosen when it is compiled
        bits = scores.to(tl.int32, bitcast=True)
        return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@jit
def row_keys(scores, row, start, first, last, length, BLOCK: tl.constexpr, ALIGNMENT: tl.constexpr):
    """Ordered scores of tokens `start` to `start + BLOCK` of a row; below NONE outside of [first, last)."""
    ELEMENTS: tl.constexpr = ALIGNMENT * 8 // scores.dtype.element_ty.primitive_bitwidth
    token = start + tl.arange(0, BLOCK)
    # The length is a multiple of ELEMENTS; seeing that, the compiler loads as many at a time.
    live = token < length // ELEMENTS * ELEMENTS
    values = tl.load(tl.multiple_of(scores + row * length + token, ALIGNMENT), mask=live, other=0)
    return tl.where((token >= first) & (token < last), ordered(values), -0x80000000)


@jit
def inner_keys(scores, row, start, length, BLOCK: tl.constexpr, ALIGNMENT: tl.constexpr):
    """`row_keys` of tokens that all lie in [first, last)."""
    token = start + tl.arange(0, BLOCK)
    return ordered(tl.load(tl.multiple_of(scores + row * length + token, ALIGNMENT)))


@jit
def row_end(last, row, heads, length):
    """`last` of a row, within [0, length], as int32."""
    return tl.minimum(tl.maximum(tl.load(last + row // heads), 0), length).to(tl.int32)


@jit
def row_keep(keep, row, rows_per_keep, count):
    """`keep` of a row, within [0, count], as int32."""
    return tl.minimum(tl.maximum(tl.load(keep + row // rows_per_keep), 0), count).to(tl.int32)


@jit
def kept_flags(keys, threshold):
    """1 for a key above the threshold, 1 << 16 for one that equals it: counted apart in one sum."""
    return (keys > threshold).to(tl.int32) + ((keys == threshold).to(tl.int32) << 16)


@jit
def find_threshold(keys, low, high, wanted):
    """A value v in [low, high] with count(keys > v) <= wanted <= count(keys >= v), by thirds.

    Needs count(keys > high) <= wanted. Both counts of a round fit one sum, which is what takes its time.
    Interpolating took longer on an H100: label scores tie too often for a straight line to help. So did quarters and
    eighths, whose sums are several.
    """
    while low < high:
        span = high.to(tl.uint32) - low.to(tl.uint32)
        lower = (low.to(tl.uint32) + span // 3).to(tl.int32)
        upper = (low.to(tl.uint32) + span // 3 * 2 + span % 3 * 2 // 3).to(tl.int32)
        both = tl.sum((keys > lower).to(tl.int32) + ((keys > upper).to(tl.int32) << 16), 0)
        above_lower = both & 0xFFFF
        above_upper = (both >> 16) & 0xFFFF
        if above_lower <= wanted:
            high = lower
            if above_lower == wanted:
                low = lower
        elif above_upper <= wanted:
            low = lower + 1
            high = upper
            if above_upper == wanted:
                low = upper
        else:
            low = upper + 1
    return low


@jit
def write_kept(out, row, count, keys, start, threshold, ties, above, equal, BLOCK: tl.constexpr):
    """Write the tokens of `keys` that are kept, after `above` and `equal` ones of the row before them."""
    flags = kept_flags(keys, threshold)
    before = tl.cumsum(flags, 0) - flags
    above += before & 0xFFFF
    equal += before >> 16
    kept = (keys > threshold) | ((keys == threshold) & (equal < ties))
    token = (start + tl.arange(0, BLOCK)).to(tl.int64)
    tl.store(out + row * count + (above + tl.minimum(equal, ties)), token, mask=kept)


@jit
def write_rest(out, row, begin, step, count, WIDTH: tl.constexpr):
    """Write -1 to every `step`-th stretch of WIDTH elements of a row, from `begin` on."""
    for stretch in range(begin, count, step):
        index = stretch + tl.arange(0, WIDTH)
        tl.store(out + row * count + index, tl.full([WIDTH], -1, tl.int64), mask=index < count)


@step_kernel(do_not_specialize=["last", "keep", "first", "length", "count"])
def select_row_kernel(
    scores,
    last,
    keep,
    out,
    first,
    length,
    count,
    heads,
    rows_per_keep,
    NONE: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    """One program per row, which holds all of it."""
    follow()
    row = tl.program_id(0).to(tl.int64)
    end = row_end(last, row, heads, length)
    wanted = row_keep(keep, row, rows_per_keep, count)
    keys = row_keys(scores, row, 0, first, end, length, BLOCK, ALIGNMENT)
    lowest = tl.full([], NONE, tl.int32)
    threshold = find_threshold(keys, lowest, tl.maximum(tl.max(keys, 0), lowest), wanted)
    above = tl.sum((keys > threshold).to(tl.int32), 0)
    ties = tl.where(threshold == NONE, 0, wanted - above)
    write_kept(out, row, count, keys, 0, threshold, ties, 0, 0, BLOCK)
    write_rest(out, row, above + ties, 1024, count, 1024)
