"""The best tokens by score, in ascending order: which rows a decode step attends to."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from ds_offload.kernels.triton_runtime import jit, launching, tl
from torch import Tensor

# -inf as an ordered integer (`_ordered`): what is not above it is no candidate.
MINUS_INF = -0x7F800001


@dataclass(frozen=True)
class SelectLaunch:
    """Launch of the CUDA kernels.

    Attributes:
        block: Tokens of a row that one program holds, at least the row; 0 where a row is
            shared out among several programs, which the other sizes are for.
        warps: Warps of a program that holds a row, a sample or a list; others have 8.
        sample: Tokens of a row from which its threshold is bracketed.
        listed: Scores of a row inside the bracket that fit in its list, below 2 ** 16.
        chunk: Tokens per program, below 2 ** 15: counts of a chunk are packed in 16 bits.
        width: Chunks of a row whose counts are summed at a time.
    """

    block: int
    warps: int = 16
    sample: int = 8192
    listed: int = 16384
    chunk: int = 2048
    width: int = 512


def select_launch(length: int) -> SelectLaunch:
    """The launch for rows of `length` tokens.

    16,384 scores are 32 registers a thread of 16 warps: rows up to that take one launch.
    For longer rows, a bracket of five standard deviations to each side must fit in the
    list with room to spare. With 8,192 samples of 262,144 tokens it holds about 8,000 of
    them when 1/16 is kept; from about 1/8 on it is narrowed to fit, so it misses more often.
    """
    if length <= 4096:
        return SelectLaunch(block=4096, warps=8)
    if length <= 16384:
        return SelectLaunch(block=16384)
    if length <= 1 << 18:
        return SelectLaunch(block=0)
    return SelectLaunch(block=0, sample=16384, listed=32768)


@jit
def _ordered(scores):
    """float32 as int32 of the same order: negative ones by their flipped magnitude."""
    bits = scores.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@jit
def _row_keys(scores, row, start, first, last, length, BLOCK: tl.constexpr, ALIGNMENT: tl.constexpr):
    """Ordered scores of tokens `start` to `start + BLOCK` of a row; below MINUS_INF outside of [first, last)."""
    WORDS: tl.constexpr = ALIGNMENT // 4
    token = start + tl.arange(0, BLOCK)
    # The length is a multiple of WORDS; seeing that, the compiler loads as many at a time.
    live = token < length // WORDS * WORDS
    values = tl.load(tl.multiple_of(scores + row * length + token, ALIGNMENT), mask=live, other=float("-inf"))
    return tl.where((token >= first) & (token < last), _ordered(values), -0x80000000)


@jit
def _row_end(last, row, heads, length):
    """`last` of a row, within [0, length], as int32."""
    return tl.minimum(tl.maximum(tl.load(last + row // heads), 0), length).to(tl.int32)


@jit
def _row_keep(keep, row, rows_per_keep, count):
    """`keep` of a row, within [0, count], as int32."""
    return tl.minimum(tl.maximum(tl.load(keep + row // rows_per_keep), 0), count).to(tl.int32)


@jit
def _flags(keys, threshold):
    """1 for a key above the threshold, 1 << 16 for one that equals it: counted apart in one sum."""
    return (keys > threshold).to(tl.int32) + ((keys == threshold).to(tl.int32) << 16)


@jit
def _find_threshold(keys, low, high, wanted, slack):
    """A value v in [low, high] with count(keys > v) <= wanted <= count(keys >= v), by bisection.

    Needs count(keys > high) <= wanted. Stops early once wanted - slack to `wanted` keys are above v.
    """
    while low < high:
        middle = (low & high) + ((low ^ high) >> 1)
        above = tl.sum((keys > middle).to(tl.int32), 0)
        if above > wanted:
            low = middle + 1
        else:
            high = middle
            if above >= wanted - slack:
                low = middle
    return low


@jit
def _write_kept(out, row, count, keys, start, threshold, ties, above, equal, BLOCK: tl.constexpr):
    """Write the tokens of `keys` that are kept, after `above` and `equal` ones of the row before them."""
    flags = _flags(keys, threshold)
    before = tl.cumsum(flags, 0) - flags
    above += before & 0xFFFF
    equal += before >> 16
    kept = (keys > threshold) | ((keys == threshold) & (equal < ties))
    token = (start + tl.arange(0, BLOCK)).to(tl.int64)
    tl.store(out + row * count + (above + tl.minimum(equal, ties)), token, mask=kept)


@jit
def _write_rest(out, row, begin, step, count, WIDTH: tl.constexpr):
    """Write -1 to every `step`-th stretch of WIDTH elements of a row, from `begin` on."""
    for stretch in range(begin, count, step):
        index = stretch + tl.arange(0, WIDTH)
        tl.store(out + row * count + index, tl.full([WIDTH], -1, tl.int64), mask=index < count)


@jit(do_not_specialize=["last", "keep", "first", "length", "count"])
def _select_row_kernel(
    scores,
    last,
    keep,
    out,
    first,
    length,
    count,
    heads,
    rows_per_keep,
    MINUS_INF: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    """One program per row, which holds all of it."""
    row = tl.program_id(0).to(tl.int64)
    end = _row_end(last, row, heads, length)
    wanted = _row_keep(keep, row, rows_per_keep, count)
    keys = _row_keys(scores, row, 0, first, end, length, BLOCK, ALIGNMENT)
    lowest = tl.full([], MINUS_INF, tl.int32)
    threshold = _find_threshold(keys, lowest, tl.maximum(tl.max(keys, 0), lowest), wanted, 0)
    above = tl.sum((keys > threshold).to(tl.int32), 0)
    ties = tl.where(threshold == MINUS_INF, 0, wanted - above)
    _write_kept(out, row, count, keys, 0, threshold, ties, 0, 0, BLOCK)
    _write_rest(out, row, above + ties, 1024, count, 1024)


@jit(do_not_specialize=["last", "keep", "first", "length", "count"])
def _bracket_kernel(
    scores,
    last,
    keep,
    state,
    first,
    length,
    count,
    heads,
    rows_per_keep,
    MINUS_INF: tl.constexpr,
    SAMPLE: tl.constexpr,
    SHIFT: tl.constexpr,
    LISTED: tl.constexpr,
):
    """Two programs per row: values that very likely enclose the threshold, from a sample.

    state[row]: the value above it, the one below it, and a counter set to 0.
    """
    row = tl.program_id(0).to(tl.int64)
    below = tl.program_id(1)
    end = _row_end(last, row, heads, length)
    wanted = _row_keep(keep, row, rows_per_keep, count)
    tokens = tl.maximum(end - first, 0)
    index = tl.arange(0, SAMPLE)
    slack = wanted * 0
    value = tl.full([], MINUS_INF, tl.int32)
    search = wanted < tokens
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
        if below == 0:
            wanted = tl.floor(rank - spread).to(tl.int32)
            if wanted < 0:
                value = tl.full([], 0x7FFFFFFF, tl.int32)
                search = False
        else:
            wanted = tl.ceil(rank + spread).to(tl.int32) + slack
            search = search & (wanted < SAMPLE)
    if search:
        live = offset < tokens
        values = tl.load(scores + row * length + first + offset, mask=live, other=float("-inf"))
        keys = tl.where(live, _ordered(values), -0x80000000)
        value = _find_threshold(keys, value, tl.maximum(tl.max(keys, 0), value), wanted, slack)
    tl.store(state + row * 8 + below, value)
    if below == 0:
        tl.store(state + row * 8 + 2, 0)


@jit(do_not_specialize=["last", "first", "length", "chunks"])
def _classify_kernel(
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
    chunk = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    end = _row_end(last, row, heads, length)
    top = tl.load(state + row * 8)
    bottom = tl.load(state + row * 8 + 1)
    start = chunk * CHUNK
    upper = start * 0
    lower = start * 0
    place = start * 0
    if (start < end) & (start + CHUNK > first):
        keys = _row_keys(scores, row, start, first, end, length, CHUNK, ALIGNMENT)
        inside = ((keys > bottom) & (keys < top)).to(tl.int32)
        at_bottom = ((keys == bottom) & (bottom < top)).to(tl.int32)
        upper = tl.sum(_flags(keys, top), 0)
        lower = tl.sum(inside + (at_bottom << 16), 0)
        if (lower & 0xFFFF) > 0:
            place = tl.atomic_add(state + row * 8 + 2, lower & 0xFFFF, sem="relaxed")
            index = place + tl.cumsum(inside, 0) - 1
            tl.store(listed + row * LISTED + index, keys, mask=(inside > 0) & (index < LISTED))
    entry = table + row * 3 * chunks + chunk
    tl.store(entry, upper)
    tl.store(entry + chunks, lower)
    tl.store(entry + 2 * chunks, place)


@jit
def _search_row(scores, row, first, last, length, low, high, wanted, BLOCK: tl.constexpr, ALIGNMENT: tl.constexpr):
    """`_find_threshold` over a whole row in memory."""
    while low < high:
        middle = (low & high) + ((low ^ high) >> 1)
        above = middle * 0
        for start in range(0, last, BLOCK):
            keys = _row_keys(scores, row, start, first, last, length, BLOCK, ALIGNMENT)
            above += tl.sum((keys > middle).to(tl.int32), 0)
        if above > wanted:
            low = middle + 1
        else:
            high = middle
            if above == wanted:
                low = middle
    return low


@jit(do_not_specialize=["last", "keep", "first", "length", "count", "chunks"])
def _threshold_kernel(
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
    MINUS_INF: tl.constexpr,
    LISTED: tl.constexpr,
    CHUNK: tl.constexpr,
    WIDTH: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    """One program per row: its exact threshold, and what of each chunk's tokens comes before it.

    state[row, 3:6]: the threshold, how many that equal it are kept, how many are kept in all.
    table[row, :2, chunk]: tokens of earlier chunks above the threshold, and equal to it.
    """
    row = tl.program_id(0).to(tl.int64)
    end = _row_end(last, row, heads, length)
    wanted = _row_keep(keep, row, rows_per_keep, count)
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
    at_top = (wanted >= above) & ((wanted <= to_top) | (top == MINUS_INF))
    if not at_top:
        listable = (wanted > to_top) & (wanted <= to_top + inside)
        past = wanted > to_top + inside
        if listable & (inside <= LISTED):
            index = tl.arange(0, LISTED)
            keys = tl.load(rank + index, mask=index < inside, other=-0x80000000)
            threshold = _find_threshold(keys, bottom, top - 1, wanted - to_top, 0)
            # Each chunk's part of the list lies together: its counts are differences of these.
            sums = tl.cumsum(_flags(keys, threshold), 0)
            tl.debug_barrier()
            tl.store(rank + index, sums, mask=index < inside)
            from_list = True
        elif past & ((wanted <= to_top + inside + at_bottom) | (bottom == MINUS_INF)):
            threshold = bottom
        else:
            # The sample was off, or too much is inside: search all of the row.
            low = bottom
            high = top
            if wanted < above:
                low = top + 1
                high = tl.full([], 0x7FFFFFFF, tl.int32)
            elif past:
                low = tl.full([], MINUS_INF, tl.int32)
                high = bottom - 1
            threshold = _search_row(scores, row, first, end, length, low, high, wanted, CHUNK, ALIGNMENT)
            for chunk in range(0, chunks):
                keys = _row_keys(scores, row, chunk * CHUNK, first, end, length, CHUNK, ALIGNMENT)
                tl.store(entries + chunk, tl.sum(_flags(keys, threshold), 0))
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
    ties = tl.where(threshold == MINUS_INF, 0, wanted - above)
    tl.store(state + row * 8 + 3, threshold)
    tl.store(state + row * 8 + 4, ties)
    tl.store(state + row * 8 + 5, above + ties)


@jit(do_not_specialize=["last", "first", "length", "count", "chunks"])
def _write_kernel(
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
    chunk = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    end = _row_end(last, row, heads, length)
    start = chunk * CHUNK
    kept = tl.load(state + row * 8 + 5)
    if (start < end) & (start + CHUNK > first) & (kept > 0):
        threshold = tl.load(state + row * 8 + 3)
        ties = tl.load(state + row * 8 + 4)
        above = tl.load(table + row * 3 * chunks + chunk)
        equal = tl.load(table + (row * 3 + 1) * chunks + chunk)
        keys = _row_keys(scores, row, start, first, end, length, CHUNK, ALIGNMENT)
        _write_kept(out, row, count, keys, start, threshold, ties, above, equal, CHUNK)
    _write_rest(out, row, kept + chunk * CHUNK, chunks * CHUNK, count, CHUNK)


def select_tokens(
    scores: Tensor, first: int, last: Tensor, keep: Tensor, count: int, out: Tensor | None = None
) -> Tensor:
    """The tokens of the highest scores of each row, ascending.

    Candidates of sequence b are the tokens t with first <= t < last[b] and a score above
    -inf. The min(keep, count, candidates) best are kept; of equal scores the lower
    token, and -0.0 is below 0.0. On CUDA it can be captured in a graph: one launch for
    rows of up to 16,384 tokens, else four, which read the scores twice.

    Args:
        scores: float32 [B, Hkv, T], contiguous, without NaN.
        first: The first candidate, 0 or more.
        last: int64 [B] on the scores' device; the end of the candidates, of any value.
        keep: int64 [B] or [B, Hkv] on the scores' device; below 0: as 0.
        count: Columns of the result, of any size.
        out: int64 [B, Hkv, count], contiguous.

    Returns:
        int64 [B, Hkv, count]: `out` if given; the kept tokens, then -1.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    out = _checked_out(scores, first, last, keep, count, out)
    if not scores.is_cuda:
        return _select_on_cpu(scores, first, last, keep, count, out)
    with launching(scores.device, "select_tokens"):
        _launch(scores, first, last, keep, count, out)
    return out


def _launch(scores: Tensor, first: int, last: Tensor, keep: Tensor, count: int, out: Tensor) -> None:
    batch, heads, length = scores.shape
    rows = batch * heads
    if rows == 0 or count == 0:
        return
    launch = select_launch(length)
    last, keep = last.contiguous(), keep.contiguous()
    rows_per_keep = heads if keep.dim() == 1 else 1
    first = min(first, length)
    alignment = math.gcd(16, scores.data_ptr(), 4 * length)
    ends = {"MINUS_INF": MINUS_INF, "num_warps": launch.warps}
    if launch.block:
        tail = (first, length, count, heads, rows_per_keep)
        _select_row_kernel[(rows,)](scores, last, keep, out, *tail, BLOCK=launch.block, ALIGNMENT=alignment, **ends)
        return
    chunks = -(-length // launch.chunk)
    state = torch.empty(rows, 8, dtype=torch.int32, device=scores.device)
    table = torch.empty(rows, 3, chunks, dtype=torch.int32, device=scores.device)
    listed = torch.empty(rows, launch.listed, dtype=torch.int32, device=scores.device)
    sizes = {"CHUNK": launch.chunk, "ALIGNMENT": alignment}
    shift = launch.sample.bit_length() - 1
    _bracket_kernel[(rows, 2)](
        *(scores, last, keep, state, first, length, count, heads, rows_per_keep),
        **{"SAMPLE": launch.sample, "SHIFT": shift, "LISTED": launch.listed},
        **ends,
    )
    _classify_kernel[(chunks, rows)](
        scores, last, state, table, listed, first, length, chunks, heads, LISTED=launch.listed, num_warps=8, **sizes
    )
    _threshold_kernel[(rows,)](
        *(scores, last, keep, state, table, listed, first, length, count, chunks, heads, rows_per_keep),
        **{"LISTED": launch.listed, "WIDTH": launch.width},
        **sizes,
        **ends,
    )
    _write_kernel[(chunks, rows)](
        scores, last, state, table, out, first, length, count, chunks, heads, num_warps=8, **sizes
    )


def _select_on_cpu(scores: Tensor, first: int, last: Tensor, keep: Tensor, count: int, out: Tensor) -> Tensor:
    """`select_tokens` row by row: a partition of 32-bit integers is 20 times as fast as torch's topk of 64-bit ones."""
    batch, heads, length = scores.shape
    bits = scores.view(torch.int32).numpy()
    wanted = (keep[:, None] if keep.dim() == 1 else keep).expand(batch, heads).tolist()
    ends = last.tolist()
    out.fill_(-1)
    for b, h in np.ndindex(batch, heads):
        row = bits[b, h, first : max(0, min(ends[b], length))]
        keys = row ^ ((row >> 31) & 0x7FFFFFFF)
        kept = max(0, min(wanted[b][h], count))
        chosen = keys > MINUS_INF
        if 0 < kept < len(keys):
            threshold = max(np.partition(keys, len(keys) - kept)[len(keys) - kept], MINUS_INF)
            above = keys > threshold
            if threshold > MINUS_INF:
                above[np.flatnonzero(keys == threshold)[: kept - above.sum()]] = True
            chosen = above
        tokens = np.flatnonzero(chosen)[:kept] + first
        out[b, h, : len(tokens)] = torch.from_numpy(tokens)
    return out


def top_tokens(scores: Tensor, count: int) -> Tensor:
    """Indices `[..., count]` int64 of the highest `scores` `[..., T]` float32, the best first.

    Equal scores are taken lowest index first (labels of few bits tie often), so the
    result is the same on every device, and that of a smaller count is its beginning.
    """
    bits = scores.view(torch.int32)
    # As integers, floats order like this: negative ones by their flipped magnitude.
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(torch.int64)
    index = torch.arange(scores.shape[-1], device=scores.device)
    keys = (ordered << 32) | (0x7FFFFFFF - index)
    return keys.topk(count, -1).indices


def select_tokens_reference(
    scores: Tensor, first: int, last: Tensor, keep: Tensor, count: int, out: Tensor | None = None
) -> Tensor:
    """`select_tokens` in torch."""
    out = _checked_out(scores, first, last, keep, count, out)
    length = scores.shape[2]
    token = torch.arange(length, device=scores.device)
    outside = (token < first) | (token >= last[:, None, None])
    candidates = scores.masked_fill(outside, -torch.inf)
    tokens = top_tokens(candidates, min(count, length))
    rank = torch.arange(tokens.shape[2], device=scores.device)
    wanted = keep[:, None, None] if keep.dim() == 1 else keep[:, :, None]
    dropped = (rank >= wanted) | (candidates.gather(-1, tokens) == -torch.inf)
    tokens = tokens.masked_fill(dropped, length).sort(-1).values
    out.fill_(-1)
    out[..., : tokens.shape[2]] = tokens.masked_fill(tokens == length, -1)
    return out


def _checked_out(scores: Tensor, first: int, last: Tensor, keep: Tensor, count: int, out: Tensor | None) -> Tensor:
    """The result's tensor, after every argument's shape, dtype and device is checked."""
    if scores.dtype != torch.float32 or scores.dim() != 3 or not scores.is_contiguous():
        raise ValueError(f"scores {scores.dtype} {tuple(scores.shape)} must be float32 [B, Hkv, T], contiguous")
    batch, heads = scores.shape[:2]
    if last.dtype != torch.int64 or last.shape != (batch,):
        raise ValueError(f"last {last.dtype} {tuple(last.shape)} must be int64 ({batch},)")
    if keep.dtype != torch.int64 or keep.shape not in ((batch,), (batch, heads)):
        raise ValueError(f"keep {keep.dtype} {tuple(keep.shape)} must be int64 ({batch},) or ({batch}, {heads})")
    if first < 0 or count < 0:
        raise ValueError(f"first={first} and count={count} must not be negative")
    shape = (batch, heads, count)
    if out is None:
        out = torch.empty(shape, dtype=torch.int64, device=scores.device)
    elif out.dtype != torch.int64 or out.shape != shape or not out.is_contiguous():
        raise ValueError(f"out {out.dtype} {tuple(out.shape)} must be int64 {shape}, contiguous")
    for name, value in (("last", last), ("keep", keep), ("out", out)):
        if value.device != scores.device:
            raise ValueError(f"{name} is on {value.device}; it must be on {scores.device} like the scores")
    return out
