"""The Triton code of the gather: rows copied tile by tile, by a kernel of its own or in front of attention."""

from __future__ import annotations

from ds_offload.kernels.dependent_launch import follow, step_kernel
from ds_offload.kernels.segment_table import row_address
from ds_offload.kernels.triton_runtime import jit, tl


@jit
def counter(progress, number):
    """One of a launch's counters. Each has a line of 128 bytes of its own.

    Programs that wait read theirs again and again: in one line, all of them kept one slice of the level 2 cache busy.
    """
    return progress + number * 32


@jit
def copy_tiles(
    program, programs, addresses, tokens, slots, counts, out, fetched, timer,
    pairs, layer, heads, kept, segments, capacity, stride_b, stride_h, stride_slot,
    COUNTED: tl.constexpr, TOLD: tl.constexpr, TIMED: tl.constexpr, PAIRS_PAD: tl.constexpr,
    SEGMENT_TOKENS: tl.constexpr, ROW_WORDS: tl.constexpr, WORDS_PAD: tl.constexpr, TILE_ROWS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """Copy rows as 4-byte words, one of `programs` programs' share; strides of `out` in words.

    The lists of all heads are cut into tiles, and program p copies tiles p, p + programs, and so on:
    heads are fetched one after the other, and every program has as much to do. With TOLD,
    the counter of a pair counts the entries of a head that are done, behind the stores of their rows.
    """
    began = tl.zeros([1], tl.int64)
    if TIMED:
        began += tl.extra.cuda.globaltimer()
    each = tl.arange(0, PAIRS_PAD)
    listed = tl.load(counts + each, mask=each < pairs, other=0) if COUNTED else tl.where(each < pairs, kept, 0)
    ends = tl.cumsum((listed + (TILE_ROWS - 1)) // TILE_ROWS, 0)
    tiles = tl.max(ends, 0)
    word = tl.arange(0, WORDS_PAD)
    tile = program
    while tile < tiles:
        before = ends <= tile
        pair = tl.sum(before.to(tl.int32), 0)
        first = (tile - tl.max(tl.where(before, ends, 0), 0)) * TILE_ROWS
        count = tl.sum(tl.where(each == pair, listed, 0), 0)
        list_start = pair.to(tl.int64) * kept
        b = pair // heads + tl.zeros([TILE_ROWS], tl.int32)
        h = pair % heads + tl.zeros([TILE_ROWS], tl.int32)
        out_rows = out + (pair // heads).to(tl.int64) * stride_b + (pair % heads).to(tl.int64) * stride_h
        index = first + tl.arange(0, TILE_ROWS)
        token = tl.load(tokens + list_start + index, mask=index < count, other=-1)
        slot = tl.load(slots + list_start + index, mask=index < count, other=-1)
        live = (token >= 0) & (slot >= 0) & (slot < capacity)
        address = row_address(addresses, b, h, token, live, layer, heads, segments, SEGMENT_TOKENS, ROW_WORDS * 4)
        copied = (address != 0)[:, None] & (word < ROW_WORDS)[None, :]
        source = address.to(tl.pointer_type(tl.int32))[:, None] + word[None, :]
        target = out_rows + (slot * stride_slot)[:, None] + word[None, :]
        # Loaded addresses carry no alignment the compiler could see; without the hint it copies word by word.
        source = tl.multiple_of(source, [1, ALIGNMENT])
        target = tl.multiple_of(target, [1, ALIGNMENT])
        tl.store(target, tl.load(source, mask=copied, other=0), mask=copied)
        if TOLD:
            # The stores of all threads come before what one of them tells.
            tl.debug_barrier()
            tl.atomic_add(counter(fetched, pair), tl.minimum(count - first, TILE_ROWS), sem="release")
        tile += programs
    if TIMED:
        # Every store is on its way before the time is taken: loads from the host were waited for.
        tl.debug_barrier()
        if program < tiles:
            tl.atomic_min(timer + tl.arange(0, 1), began)
            tl.atomic_max(timer + 1 + tl.arange(0, 1), tl.zeros([1], tl.int64) + tl.extra.cuda.globaltimer())


@jit
def wait_for_rows(fetched, counts, pair):
    """Return when all entries of a head's list are fetched by programs of this launch that began before this one."""
    count = tl.load(counts + pair)
    if count > 0:
        # Plain reads, which keep nobody off the counter; then one that orders what follows.
        while tl.load(counter(fetched, pair), volatile=True) < count:
            pass
        while tl.atomic_add(counter(fetched, pair), 0, sem="acquire") < count:
            pass


@jit
def attending_program(
    rows, addresses, tokens, slots, counts, progress, timer, layer, segments, kept,
    pairs, heads, capacity, stride_b, stride_h, stride_slot,
    FETCHERS: tl.constexpr, ELEMENT_BITS: tl.constexpr, TIMED: tl.constexpr, PAIRS_PAD: tl.constexpr,
    FETCH_SEGMENT: tl.constexpr, ROW_WORDS: tl.constexpr, WORDS_PAD: tl.constexpr, FETCH_TILE: tl.constexpr,
    FETCH_ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """This program's number among those that attend; below 0 for the FETCHERS that begin first, their rows copied.

    Strides of `rows` are in elements.
    """
    program = tl.program_id(0)
    if FETCHERS > 0:
        program = tl.atomic_add(counter(progress, pairs), 1, sem="relaxed")
        if program < FETCHERS:
            words = rows.to(tl.pointer_type(tl.int32))
            per_word: tl.constexpr = 32 // ELEMENT_BITS
            copy_tiles(
                program, FETCHERS, addresses, tokens, slots, counts, words, progress, timer,
                pairs, layer, heads, kept, segments, capacity,
                stride_b // per_word, stride_h // per_word, stride_slot // per_word,
                True, True, TIMED, PAIRS_PAD, FETCH_SEGMENT, ROW_WORDS, WORDS_PAD, FETCH_TILE, FETCH_ALIGNMENT,
            )  # fmt: skip
    return program - FETCHERS


@step_kernel(do_not_specialize=["pairs", "layer", "kept", "segments", "capacity"])
def gather_kernel(
    addresses, tokens, slots, counts, out, timer,
    pairs, layer, heads, kept, segments, capacity, stride_b, stride_h, stride_slot,
    COUNTED: tl.constexpr, TIMED: tl.constexpr, PAIRS_PAD: tl.constexpr, SEGMENT_TOKENS: tl.constexpr,
    ROW_WORDS: tl.constexpr, WORDS_PAD: tl.constexpr, TILE_ROWS: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """Copy rows, and nothing else; see `copy_tiles`."""
    follow()
    copy_tiles(
        tl.program_id(0), tl.num_programs(0), addresses, tokens, slots, counts, out, None, timer,
        pairs, layer, heads, kept, segments, capacity, stride_b, stride_h, stride_slot,
        COUNTED, False, TIMED, PAIRS_PAD, SEGMENT_TOKENS, ROW_WORDS, WORDS_PAD, TILE_ROWS, ALIGNMENT,
    )  # fmt: skip
