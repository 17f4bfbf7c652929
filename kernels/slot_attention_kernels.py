"""The Triton kernels of slot attention: splits of the slots list side by side, then their sum.

The first kernel, one of two, leaves for every head and split the largest score `peak`
and the sum `total` of the weights in `stats` float32 [B * H, splits, 2], and the
weighted sum of V in `partial` float32 [B * H, splits, D], from `first_split` on. Scores are in powers of two:
`scale` is the scaling times log2(e).

With FETCHERS, the programs that begin first copy missing rows from the host (`kernels/arriving.py`), and the others
wait for those of their head before they read any.
"""

from __future__ import annotations

from ds_offload.kernels.dependent_launch import follow, step_kernel
from ds_offload.kernels.gather_kernels import attending_program, wait_for_rows
from ds_offload.kernels.segment_table import row_address
from ds_offload.kernels.triton_runtime import jit, tl

# Numbers that change from call to call: a kernel is compiled once for all.
NUMBERS = [
    *("count", "slots_stride", "capacity", "stride_b", "stride_h", "stride_row", "layer", "segments"),
    *("splits", "first_split", "list_splits", "pairs", "fetch_layer", "fetch_segments", "missing_most"),
]


@jit
def slot_tile(slots, index, count, capacity):
    """Entries `index` of a slots list: int64 slots, and whether each names a row."""
    listed = index < count
    slot = tl.load(slots + index, mask=listed, other=0)
    return slot, listed & (slot >= 0) & (slot < capacity)


@jit
def row_pointers(
    rows,
    slot,
    live,
    b,
    h,
    kv_heads,
    layer,
    segments,
    stride_b,
    stride_h,
    stride_row,
    SEGMENT_TOKENS: tl.constexpr,
    D: tl.constexpr,
    ELEMENT: tl.constexpr,
):
    """Pointers to the rows at `slot` [N] of sequence b and KV head h, and which of them are there.

    Without segments `rows` points to a tensor with strides; with them to int64 addresses
    of segments (kernels/segment_table.py), and slots are token numbers.
    """
    if SEGMENT_TOKENS == 0:
        pointers = rows + b * stride_b + h * stride_h + slot * stride_row
    else:
        ROW_BYTES: tl.constexpr = 2 * D * ELEMENT.primitive_bitwidth // 8
        sequence, head = tl.zeros_like(slot) + b, tl.zeros_like(slot) + h
        address = row_address(rows, sequence, head, slot, live, layer, kv_heads, segments, SEGMENT_TOKENS, ROW_BYTES)
        live = address != 0
        pointers = address.to(tl.pointer_type(ELEMENT))
    return pointers, live


@jit
def row_tile(pointers, live, channel, HALF: tl.constexpr, D: tl.constexpr, ALIGNMENT: tl.constexpr):
    """K (HALF 0) or V (HALF 1) of rows [N], as [N, channels]: 0 where not live or beyond D."""
    elements = pointers[:, None] + (HALF * D + channel)[None, :]
    # Slots and strides are not known when it is compiled; without the hint it reads element by element.
    elements = tl.multiple_of(elements, [1, ALIGNMENT])
    return tl.load(elements, mask=live[:, None] & (channel < D)[None, :], other=0.0)


@jit
def finite_peak(peak):
    """The maximum to subtract from scores: 0 where there was none yet, so that nothing becomes NaN."""
    return tl.where(peak == float("-inf"), 0.0, peak)


@step_kernel(do_not_specialize=NUMBERS)
def slot_vector_kernel(
    query, rows, slots, partial, stats, scale, kv_heads, count, slots_stride, capacity,
    stride_b, stride_h, stride_row, layer, segments, splits, first_split,
    list_splits, pairs, addresses, missing, missing_slots, missing_counts, progress, timer,
    fetch_layer, fetch_segments, missing_most,
    SEGMENT_TOKENS: tl.constexpr, ELEMENT: tl.constexpr, G: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    SPLIT: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr, ALIGNMENT: tl.constexpr,
    FETCHERS: tl.constexpr, TIMED: tl.constexpr, PAIRS_PAD: tl.constexpr, FETCH_SEGMENT: tl.constexpr,
    ROW_WORDS: tl.constexpr, WORDS_PAD: tl.constexpr, FETCH_TILE: tl.constexpr, FETCH_ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """One split of one head, multiplied without tensor cores.

    Each place of a tile keeps its own softmax and sum: warps exchange nothing before the end.
    """
    follow()
    program = attending_program(
        rows, addresses, missing, missing_slots, missing_counts, progress, timer,
        fetch_layer, fetch_segments, missing_most, pairs, kv_heads, capacity, stride_b, stride_h, stride_row,
        FETCHERS, ELEMENT.primitive_bitwidth, TIMED, PAIRS_PAD, FETCH_SEGMENT, ROW_WORDS, WORDS_PAD, FETCH_TILE,
        FETCH_ALIGNMENT,
    )  # fmt: skip
    if program >= 0:
        pair = (program // list_splits % pairs).to(tl.int64)
        head = pair * G + program // (list_splits * pairs)
        channel = tl.arange(0, D_PAD)
        q = tl.load(query + head * D + channel, mask=channel < D, other=0.0).to(tl.float32) * scale
        b = pair // kv_heads
        h = pair % kv_heads
        slots += pair * slots_stride
        peak = tl.full([TILE], float("-inf"), tl.float32)
        total = tl.zeros([TILE], tl.float32)
        acc = tl.zeros([TILE, D_PAD], tl.float32)
        if FETCHERS > 0:
            wait_for_rows(progress, missing_counts, pair)
        first = program % list_splits * SPLIT
        for start in tl.range(0, SPLIT, TILE, num_stages=STAGES):
            slot, live = slot_tile(slots, first + start + tl.arange(0, TILE), count, capacity)
            pointers, live = row_pointers(
                rows,
                slot,
                live,
                b,
                h,
                kv_heads,
                layer,
                segments,
                stride_b,
                stride_h,
                stride_row,
                SEGMENT_TOKENS,
                D,
                ELEMENT,
            )
            keys = row_tile(pointers, live, channel, 0, D, ALIGNMENT).to(tl.float32)
            values = row_tile(pointers, live, channel, 1, D, ALIGNMENT).to(tl.float32)
            score = tl.where(live, tl.sum(q[None, :] * keys, 1), float("-inf"))
            new_peak = tl.maximum(peak, score)
            shift = finite_peak(new_peak)
            fade = tl.exp2(peak - shift)
            weight = tl.exp2(score - shift)
            total = total * fade + weight
            acc = acc * fade[:, None] + weight[:, None] * values
            peak = new_peak
        top = tl.max(peak, 0)
        fade = tl.exp2(peak - finite_peak(top))
        part = head * splits + first_split + program % list_splits
        tl.store(stats + 2 * part, top)
        tl.store(stats + 2 * part + 1, tl.sum(total * fade, 0))
        tl.store(partial + part * D + channel, tl.sum(acc * fade[:, None], 0), mask=channel < D)


@step_kernel(do_not_specialize=NUMBERS)
def slot_tensor_core_kernel(
    query, rows, slots, partial, stats, scale, kv_heads, count, slots_stride, capacity,
    stride_b, stride_h, stride_row, layer, segments, splits, first_split,
    list_splits, pairs, addresses, missing, missing_slots, missing_counts, progress, timer,
    fetch_layer, fetch_segments, missing_most,
    SEGMENT_TOKENS: tl.constexpr, ELEMENT: tl.constexpr, G: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    SPLIT: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr, ALIGNMENT: tl.constexpr,
    FETCHERS: tl.constexpr, TIMED: tl.constexpr, PAIRS_PAD: tl.constexpr, FETCH_SEGMENT: tl.constexpr,
    ROW_WORDS: tl.constexpr, WORDS_PAD: tl.constexpr, FETCH_TILE: tl.constexpr, FETCH_ALIGNMENT: tl.constexpr,
    HEADS: tl.constexpr,
):  # fmt: skip
    """One split of up to HEADS query heads of a KV head, on the tensor cores."""
    follow()
    program = attending_program(
        rows, addresses, missing, missing_slots, missing_counts, progress, timer,
        fetch_layer, fetch_segments, missing_most, pairs, kv_heads, capacity, stride_b, stride_h, stride_row,
        FETCHERS, ELEMENT.primitive_bitwidth, TIMED, PAIRS_PAD, FETCH_SEGMENT, ROW_WORDS, WORDS_PAD, FETCH_TILE,
        FETCH_ALIGNMENT,
    )  # fmt: skip
    if program >= 0:
        pair = (program // list_splits % pairs).to(tl.int64)
        member = program // (list_splits * pairs) * HEADS + tl.arange(0, HEADS)
        head = pair * G + member
        channel = tl.arange(0, D_PAD)
        written = (member < G)[:, None] & (channel < D)[None, :]
        q = tl.load(query + head[:, None] * D + channel[None, :], mask=written, other=0.0)
        b = pair // kv_heads
        h = pair % kv_heads
        slots += pair * slots_stride
        peak = tl.full([HEADS], float("-inf"), tl.float32)
        total = tl.zeros([HEADS], tl.float32)
        acc = tl.zeros([HEADS, D_PAD], tl.float32)
        if FETCHERS > 0:
            wait_for_rows(progress, missing_counts, pair)
        first = program % list_splits * SPLIT
        for start in tl.range(0, SPLIT, TILE, num_stages=STAGES):
            slot, live = slot_tile(slots, first + start + tl.arange(0, TILE), count, capacity)
            pointers, live = row_pointers(
                rows,
                slot,
                live,
                b,
                h,
                kv_heads,
                layer,
                segments,
                stride_b,
                stride_h,
                stride_row,
                SEGMENT_TOKENS,
                D,
                ELEMENT,
            )
            keys = row_tile(pointers, live, channel, 0, D, ALIGNMENT)
            values = row_tile(pointers, live, channel, 1, D, ALIGNMENT)
            scores = tl.dot(q, tl.trans(keys), input_precision="ieee") * scale
            scores = tl.where(live[None, :], scores, float("-inf"))
            new_peak = tl.maximum(peak, tl.max(scores, 1))
            shift = finite_peak(new_peak)
            fade = tl.exp2(peak - shift)
            weight = tl.exp2(scores - shift[:, None])
            total = total * fade + tl.sum(weight, 1)
            acc = tl.dot(weight.to(values.dtype), values, acc * fade[:, None], input_precision="ieee")
            peak = new_peak
        part = head * splits + first_split + program % list_splits
        tl.store(stats + 2 * part, peak, mask=member < G)
        tl.store(stats + 2 * part + 1, total, mask=member < G)
        tl.store(partial + part[:, None] * D + channel[None, :], acc, mask=written)


@step_kernel(do_not_specialize=["splits"])
def combine_kernel(
    partial, stats, out, splits, D: tl.constexpr, SPLITS_TILE: tl.constexpr, CHANNELS_TILE: tl.constexpr
):
    """Adds up a head's splits in ascending order, a fixed number at a time.

    Splits without a slot come with peak -inf and sums 0: they change no bit.
    """
    follow()
    head = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS_TILE + tl.arange(0, CHANNELS_TILE)
    peak = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([CHANNELS_TILE], tl.float32)
    first = 0
    while first < splits:
        split = first + tl.arange(0, SPLITS_TILE)
        part = head * splits + split
        peaks = tl.load(stats + 2 * part, mask=split < splits, other=float("-inf"))
        totals = tl.load(stats + 2 * part + 1, mask=split < splits, other=0.0)
        known = (split < splits)[:, None] & (channel < D)[None, :]
        sums = tl.load(partial + part[:, None] * D + channel[None, :], mask=known, other=0.0)
        new_peak = tl.maximum(peak, tl.max(peaks, 0))
        shift = finite_peak(new_peak)
        fade = tl.exp2(peak - shift)
        weight = tl.exp2(peaks - shift)
        total = total * fade + tl.sum(weight * totals, 0)
        acc = acc * fade + tl.sum(weight[:, None] * sums, 0)
        peak = new_peak
        first += SPLITS_TILE
    tl.store(out + head * D + channel, acc / total, mask=channel < D)
