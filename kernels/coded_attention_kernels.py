"""The Triton kernels of attention over quantised rows (kernels/coded_attention.py): one split of the list each.

K of a row is, per half of its channels, centre + step * u, u the codes less N/2, times a
static factor per channel. So a score is, per half, step times the product of u with the
query times the factors, plus centre times the sum of that query. V's centre and step go
into the weights. Codes, and a query times a power of two, are exact in 16 bits: the tensor
cores cut nothing but the weights.
"""

from __future__ import annotations

from ds_offload.kernels.dependent_launch import follow, step_kernel
from ds_offload.kernels.gather_kernels import attending_program, wait_for_rows
from ds_offload.kernels.kv_codec_kernels import code_halves, tail_numbers
from ds_offload.kernels.slot_attention_kernels import NUMBERS, finite_peak, row_pointers, slot_tile
from ds_offload.kernels.triton_runtime import tl


@step_kernel(do_not_specialize=NUMBERS)
def coded_vector_kernel(
    query, rows, slots, factor, partial, stats, scale, kv_heads, count, slots_stride, capacity,
    stride_b, stride_h, stride_row, layer, segments, splits, first_split,
    list_splits, pairs, addresses, missing, missing_slots, missing_counts, progress, timer,
    fetch_layer, fetch_segments, missing_most,
    SEGMENT_TOKENS: tl.constexpr, BITS: tl.constexpr, PART_BYTES: tl.constexpr, G: tl.constexpr, HALF: tl.constexpr,
    HALF_PAD: tl.constexpr, SPLIT: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr, ALIGNMENT: tl.constexpr,
    FETCHERS: tl.constexpr, TIMED: tl.constexpr, PAIRS_PAD: tl.constexpr, FETCH_SEGMENT: tl.constexpr,
    ROW_WORDS: tl.constexpr, WORDS_PAD: tl.constexpr, FETCH_TILE: tl.constexpr, FETCH_ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """One split of one head, multiplied without tensor cores; see `slot_vector_kernel`."""
    follow()
    program = attending_program(
        rows, addresses, missing, missing_slots, missing_counts, progress, timer,
        fetch_layer, fetch_segments, missing_most, pairs, kv_heads, capacity, stride_b, stride_h, stride_row,
        FETCHERS, 8, TIMED, PAIRS_PAD, FETCH_SEGMENT, ROW_WORDS, WORDS_PAD, FETCH_TILE, FETCH_ALIGNMENT,
    )  # fmt: skip
    if program >= 0:
        pair = (program // list_splits % pairs).to(tl.int64)
        head = pair * G + program // (list_splits * pairs)
        b = pair // kv_heads
        h = pair % kv_heads
        channel = tl.arange(0, HALF_PAD)
        known = channel < HALF
        query += head * 2 * HALF
        factor += h * 2 * HALF
        q1 = tl.load(query + channel, mask=known, other=0.0).to(tl.float32) * scale
        q2 = tl.load(query + HALF + channel, mask=known, other=0.0).to(tl.float32) * scale
        q1 *= tl.load(factor + channel, mask=known, other=0.0)
        q2 *= tl.load(factor + HALF + channel, mask=known, other=0.0)
        sum1 = tl.sum(q1, 0)
        sum2 = tl.sum(q2, 0)
        slots += pair * slots_stride
        peak = tl.full([TILE], float("-inf"), tl.float32)
        total = tl.zeros([TILE], tl.float32)
        acc1 = tl.zeros([TILE, HALF_PAD], tl.float32)
        acc2 = tl.zeros([TILE, HALF_PAD], tl.float32)
        if FETCHERS > 0:
            wait_for_rows(progress, missing_counts, pair)
        first = program % list_splits * SPLIT
        for start in tl.range(0, SPLIT, TILE, num_stages=STAGES):
            slot, live = slot_tile(slots, first + start + tl.arange(0, TILE), count, capacity)
            keys, live = row_pointers(
                rows, slot, live, b, h, kv_heads, layer, segments, stride_b, stride_h, stride_row,
                SEGMENT_TOKENS, PART_BYTES, tl.uint8,
            )  # fmt: skip
            values = keys + PART_BYTES
            k1, k2 = code_halves(keys, live, channel, BITS, HALF, ALIGNMENT)
            v1, v2 = code_halves(values, live, channel, BITS, HALF, ALIGNMENT)
            centre1, step1, centre2, step2 = tail_numbers(keys, live, PART_BYTES)
            score = step1 * tl.sum(q1[None, :] * k1, 1) + centre1 * sum1
            score += step2 * tl.sum(q2[None, :] * k2, 1) + centre2 * sum2
            score = tl.where(live, score, float("-inf"))
            centre1, step1, centre2, step2 = tail_numbers(values, live, PART_BYTES)
            new_peak = tl.maximum(peak, score)
            shift = finite_peak(new_peak)
            fade = tl.exp2(peak - shift)
            weight = tl.exp2(score - shift)
            total = total * fade + weight
            acc1 = acc1 * fade[:, None] + (weight * step1)[:, None] * v1 + (weight * centre1)[:, None]
            acc2 = acc2 * fade[:, None] + (weight * step2)[:, None] * v2 + (weight * centre2)[:, None]
            peak = new_peak
        top = tl.max(peak, 0)
        fade = tl.exp2(peak - finite_peak(top))
        part = head * splits + first_split + program % list_splits
        tl.store(stats + 2 * part, top)
        tl.store(stats + 2 * part + 1, tl.sum(total * fade, 0))
        tl.store(partial + part * 2 * HALF + channel, tl.sum(acc1 * fade[:, None], 0), mask=known)
        tl.store(partial + part * 2 * HALF + HALF + channel, tl.sum(acc2 * fade[:, None], 0), mask=known)


@step_kernel(do_not_specialize=NUMBERS)
def coded_tensor_core_kernel(
    query, rows, slots, factor, partial, stats, scale, kv_heads, count, slots_stride, capacity,
    stride_b, stride_h, stride_row, layer, segments, splits, first_split,
    list_splits, pairs, addresses, missing, missing_slots, missing_counts, progress, timer,
    fetch_layer, fetch_segments, missing_most,
    SEGMENT_TOKENS: tl.constexpr, BITS: tl.constexpr, PART_BYTES: tl.constexpr, G: tl.constexpr, HALF: tl.constexpr,
    HALF_PAD: tl.constexpr, SPLIT: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr, ALIGNMENT: tl.constexpr,
    HEADS: tl.constexpr,
    FETCHERS: tl.constexpr, TIMED: tl.constexpr, PAIRS_PAD: tl.constexpr, FETCH_SEGMENT: tl.constexpr,
    ROW_WORDS: tl.constexpr, WORDS_PAD: tl.constexpr, FETCH_TILE: tl.constexpr, FETCH_ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """One split of up to HEADS query heads of a KV head, on the tensor cores; see `slot_tensor_core_kernel`."""
    follow()
    program = attending_program(
        rows, addresses, missing, missing_slots, missing_counts, progress, timer,
        fetch_layer, fetch_segments, missing_most, pairs, kv_heads, capacity, stride_b, stride_h, stride_row,
        FETCHERS, 8, TIMED, PAIRS_PAD, FETCH_SEGMENT, ROW_WORDS, WORDS_PAD, FETCH_TILE, FETCH_ALIGNMENT,
    )  # fmt: skip
    if program >= 0:
        pair = (program // list_splits % pairs).to(tl.int64)
        member = program // (list_splits * pairs) * HEADS + tl.arange(0, HEADS)
        head = pair * G + member
        b = pair // kv_heads
        h = pair % kv_heads
        channel = tl.arange(0, HALF_PAD)
        known = channel < HALF
        written = (member < G)[:, None] & known[None, :]
        half = query + head[:, None] * 2 * HALF + channel[None, :]
        factor += h * 2 * HALF
        q1 = tl.load(half, mask=written, other=0.0)
        q2 = tl.load(half + HALF, mask=written, other=0.0)
        kind = q1.dtype
        # Powers of two: still exact.
        q1 = (q1.to(tl.float32) * tl.load(factor + channel, mask=known, other=0.0)[None, :]).to(kind)
        q2 = (q2.to(tl.float32) * tl.load(factor + HALF + channel, mask=known, other=0.0)[None, :]).to(kind)
        sum1 = tl.sum(q1.to(tl.float32), 1)
        sum2 = tl.sum(q2.to(tl.float32), 1)
        slots += pair * slots_stride
        peak = tl.full([HEADS], float("-inf"), tl.float32)
        total = tl.zeros([HEADS], tl.float32)
        # What V's centres add to every channel of a half.
        lift1 = tl.zeros([HEADS], tl.float32)
        lift2 = tl.zeros([HEADS], tl.float32)
        acc1 = tl.zeros([HEADS, HALF_PAD], tl.float32)
        acc2 = tl.zeros([HEADS, HALF_PAD], tl.float32)
        if FETCHERS > 0:
            wait_for_rows(progress, missing_counts, pair)
        first = program % list_splits * SPLIT
        for start in tl.range(0, SPLIT, TILE, num_stages=STAGES):
            slot, live = slot_tile(slots, first + start + tl.arange(0, TILE), count, capacity)
            keys, live = row_pointers(
                rows, slot, live, b, h, kv_heads, layer, segments, stride_b, stride_h, stride_row,
                SEGMENT_TOKENS, PART_BYTES, tl.uint8,
            )  # fmt: skip
            values = keys + PART_BYTES
            k1, k2 = code_halves(keys, live, channel, BITS, HALF, ALIGNMENT)
            v1, v2 = code_halves(values, live, channel, BITS, HALF, ALIGNMENT)
            centre1, step1, centre2, step2 = tail_numbers(keys, live, PART_BYTES)
            scores = tl.dot(q1, tl.trans(k1.to(kind)), input_precision="ieee") * step1[None, :]
            scores += tl.dot(q2, tl.trans(k2.to(kind)), input_precision="ieee") * step2[None, :]
            scores += sum1[:, None] * centre1[None, :] + sum2[:, None] * centre2[None, :]
            scores = tl.where(live[None, :], scores * scale, float("-inf"))
            centre1, step1, centre2, step2 = tail_numbers(values, live, PART_BYTES)
            new_peak = tl.maximum(peak, tl.max(scores, 1))
            shift = finite_peak(new_peak)
            fade = tl.exp2(peak - shift)
            weight = tl.exp2(scores - shift[:, None])
            total = total * fade + tl.sum(weight, 1)
            lift1 = lift1 * fade + tl.sum(weight * centre1[None, :], 1)
            lift2 = lift2 * fade + tl.sum(weight * centre2[None, :], 1)
            weight1 = (weight * step1[None, :]).to(kind)
            weight2 = (weight * step2[None, :]).to(kind)
            acc1 = tl.dot(weight1, v1.to(kind), acc1 * fade[:, None], input_precision="ieee")
            acc2 = tl.dot(weight2, v2.to(kind), acc2 * fade[:, None], input_precision="ieee")
            peak = new_peak
        part = head * splits + first_split + program % list_splits
        tl.store(stats + 2 * part, peak, mask=member < G)
        tl.store(stats + 2 * part + 1, total, mask=member < G)
        target = partial + part[:, None] * 2 * HALF + channel[None, :]
        tl.store(target, acc1 + lift1[:, None], mask=written)
        tl.store(target + HALF, acc2 + lift2[:, None], mask=written)
