"""The Triton kernel of attention over rows of 4 bits without tensor cores (kernels/coded_attention.py).

Words of codes are computed with as they are, since unpacking them takes longer than reading them: see `nibble`.
"""

from __future__ import annotations

from ds_offload.kernels.dependent_launch import follow, step_kernel
from ds_offload.kernels.gather_kernels import attending_program, wait_for_rows
from ds_offload.kernels.kv_codec_kernels import tail_numbers
from ds_offload.kernels.slot_attention_kernels import NUMBERS, finite_peak, row_pointers, slot_tile
from ds_offload.kernels.triton_runtime import jit, tl


@jit
def nibble(words, PLACE: tl.constexpr):
    """Code PLACE of the eight of each int32 word, as float32, times 2^(bit - 149).

    Masked bits below the 23rd are such a number as they stand: a subnormal one, which GPUs multiply like any other.
    Codes that reach beyond it are moved by 12 bits.
    """
    BIT: tl.constexpr = 4 * PLACE if PLACE < 5 else 4 * PLACE - 12
    moved = words if PLACE < 5 else words >> 12
    return (moved & (15 << BIT)).to(tl.float32, bitcast=True)


@jit
def without_bit(values, PLACE: tl.constexpr, EXPONENT: tl.constexpr):
    """`values` times 2^(EXPONENT - bit) of `nibble`'s place."""
    BIT: tl.constexpr = 4 * PLACE if PLACE < 5 else 4 * PLACE - 12
    FACTOR: tl.constexpr = 2.0 ** (EXPONENT - BIT)
    return values * FACTOR


@jit
def half_of_words(query, factor, word, scale, HALF: tl.constexpr, BYTE: tl.constexpr):
    """The query times factors and scale in channels whose codes are in byte BYTE of the words; 0 beyond the half."""
    channel = 4 * word + BYTE
    q = tl.load(query + channel, mask=channel < HALF, other=0.0).to(tl.float32)
    return q * tl.load(factor + channel, mask=channel < HALF, other=0.0) * scale


@step_kernel(do_not_specialize=NUMBERS)
def nibble_vector_kernel(
    query, rows, slots, factor, partial, stats, scale, kv_heads, count, slots_stride, capacity,
    stride_b, stride_h, stride_row, layer, segments, splits, first_split,
    list_splits, pairs, addresses, missing, missing_slots, missing_counts, progress, timer,
    fetch_layer, fetch_segments, missing_most,
    SEGMENT_TOKENS: tl.constexpr, BITS: tl.constexpr, PART_BYTES: tl.constexpr, G: tl.constexpr, HALF: tl.constexpr,
    HALF_PAD: tl.constexpr, SPLIT: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr, ALIGNMENT: tl.constexpr,
    FETCHERS: tl.constexpr, TIMED: tl.constexpr, PAIRS_PAD: tl.constexpr, FETCH_SEGMENT: tl.constexpr,
    ROW_WORDS: tl.constexpr, WORDS_PAD: tl.constexpr, FETCH_TILE: tl.constexpr, FETCH_ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """`coded_vector_kernel` at 4 bits, whose time is that of unpacking: whole words, eight codes of each.

    A byte has a code of each half. A number is centre + step * (code - 7.5): what does not depend on the code is summed
    apart, once a row. Powers of two bring products with `nibble` to 2^-60 and 2^(bit - 79) of what they stand for.
    """
    follow()
    OFFSET: tl.constexpr = (2**BITS - 1) / 2
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
        word = tl.arange(0, HALF_PAD // 4)
        known = word * 4 < HALF
        q1 = query + head * 2 * HALF
        f1 = factor + h * 2 * HALF
        q2 = q1 + HALF
        f2 = f1 + HALF
        q10 = half_of_words(q1, f1, word, scale, HALF, 0)
        q11 = half_of_words(q1, f1, word, scale, HALF, 1)
        q12 = half_of_words(q1, f1, word, scale, HALF, 2)
        q13 = half_of_words(q1, f1, word, scale, HALF, 3)
        q20 = half_of_words(q2, f2, word, scale, HALF, 0)
        q21 = half_of_words(q2, f2, word, scale, HALF, 1)
        q22 = half_of_words(q2, f2, word, scale, HALF, 2)
        q23 = half_of_words(q2, f2, word, scale, HALF, 3)
        k10 = without_bit(q10, 0, 89)
        k11 = without_bit(q11, 2, 89)
        k12 = without_bit(q12, 4, 89)
        k13 = without_bit(q13, 6, 89)
        k20 = without_bit(q20, 1, 89)
        k21 = without_bit(q21, 3, 89)
        k22 = without_bit(q22, 5, 89)
        k23 = without_bit(q23, 7, 89)
        sum1 = tl.sum(q10 + q11 + q12 + q13, 0)
        sum2 = tl.sum(q20 + q21 + q22 + q23, 0)
        peak = tl.full([TILE], float("-inf"), tl.float32)
        total = tl.zeros([TILE], tl.float32)
        lift1 = tl.zeros([TILE], tl.float32)
        lift2 = tl.zeros([TILE], tl.float32)
        acc10 = tl.zeros([TILE, HALF_PAD // 4], tl.float32)
        acc11 = tl.zeros([TILE, HALF_PAD // 4], tl.float32)
        acc12 = tl.zeros([TILE, HALF_PAD // 4], tl.float32)
        acc13 = tl.zeros([TILE, HALF_PAD // 4], tl.float32)
        acc20 = tl.zeros([TILE, HALF_PAD // 4], tl.float32)
        acc21 = tl.zeros([TILE, HALF_PAD // 4], tl.float32)
        acc22 = tl.zeros([TILE, HALF_PAD // 4], tl.float32)
        acc23 = tl.zeros([TILE, HALF_PAD // 4], tl.float32)
        if FETCHERS > 0:
            wait_for_rows(progress, missing_counts, pair)
        listed = slots + pair * slots_stride
        first = program % list_splits * SPLIT
        for start in tl.range(0, SPLIT, TILE, num_stages=STAGES):
            slot, live = slot_tile(listed, first + start + tl.arange(0, TILE), count, capacity)
            keys, live = row_pointers(
                rows, slot, live, b, h, kv_heads, layer, segments, stride_b, stride_h, stride_row,
                SEGMENT_TOKENS, PART_BYTES, tl.uint8,
            )  # fmt: skip
            values = keys + PART_BYTES
            mask = live[:, None] & known[None, :]
            at = tl.multiple_of(keys.to(tl.pointer_type(tl.int32))[:, None] + word[None, :], [1, ALIGNMENT])
            k = tl.load(at, mask=mask, other=0)
            at = tl.multiple_of(values.to(tl.pointer_type(tl.int32))[:, None] + word[None, :], [1, ALIGNMENT])
            v = tl.load(at, mask=mask, other=0)
            centre1, step1, centre2, step2 = tail_numbers(keys, live, PART_BYTES)
            dot1 = k10[None, :] * nibble(k, 0)
            dot1 += k11[None, :] * nibble(k, 2)
            dot1 += k12[None, :] * nibble(k, 4)
            dot1 += k13[None, :] * nibble(k, 6)
            dot2 = k20[None, :] * nibble(k, 1)
            dot2 += k21[None, :] * nibble(k, 3)
            dot2 += k22[None, :] * nibble(k, 5)
            dot2 += k23[None, :] * nibble(k, 7)
            score = step1 * (tl.sum(dot1, 1) * 2.0**60 - OFFSET * sum1) + centre1 * sum1
            score += step2 * (tl.sum(dot2, 1) * 2.0**60 - OFFSET * sum2) + centre2 * sum2
            score = tl.where(live, score, float("-inf"))
            centre1, step1, centre2, step2 = tail_numbers(values, live, PART_BYTES)
            new_peak = tl.maximum(peak, score)
            shift = finite_peak(new_peak)
            fade = tl.exp2(peak - shift)
            weight = tl.exp2(score - shift)
            total = total * fade + weight
            lift1 = lift1 * fade + weight * (centre1 - OFFSET * step1)
            lift2 = lift2 * fade + weight * (centre2 - OFFSET * step2)
            fades = fade[:, None]
            weight1 = (weight * step1 * 2.0**70)[:, None]
            weight2 = (weight * step2 * 2.0**70)[:, None]
            acc10 = acc10 * fades + weight1 * nibble(v, 0)
            acc11 = acc11 * fades + weight1 * nibble(v, 2)
            acc12 = acc12 * fades + weight1 * nibble(v, 4)
            acc13 = acc13 * fades + weight1 * nibble(v, 6)
            acc20 = acc20 * fades + weight2 * nibble(v, 1)
            acc21 = acc21 * fades + weight2 * nibble(v, 3)
            acc22 = acc22 * fades + weight2 * nibble(v, 5)
            acc23 = acc23 * fades + weight2 * nibble(v, 7)
            peak = new_peak
        top = tl.max(peak, 0)
        fade = tl.exp2(peak - finite_peak(top))
        part = head * splits + first_split + program % list_splits
        tl.store(stats + 2 * part, top)
        tl.store(stats + 2 * part + 1, tl.sum(total * fade, 0))
        fades = fade[:, None]
        out = partial + part * 2 * HALF
        rest = tl.sum(lift1 * fade, 0)
        tl.store(out + 4 * word, without_bit(tl.sum(acc10 * fades, 0), 0, 79) + rest, mask=4 * word < HALF)
        tl.store(out + 4 * word + 1, without_bit(tl.sum(acc11 * fades, 0), 2, 79) + rest, mask=4 * word + 1 < HALF)
        tl.store(out + 4 * word + 2, without_bit(tl.sum(acc12 * fades, 0), 4, 79) + rest, mask=4 * word + 2 < HALF)
        tl.store(out + 4 * word + 3, without_bit(tl.sum(acc13 * fades, 0), 6, 79) + rest, mask=4 * word + 3 < HALF)
        out += HALF
        rest = tl.sum(lift2 * fade, 0)
        tl.store(out + 4 * word, without_bit(tl.sum(acc20 * fades, 0), 1, 79) + rest, mask=4 * word < HALF)
        tl.store(out + 4 * word + 1, without_bit(tl.sum(acc21 * fades, 0), 3, 79) + rest, mask=4 * word + 1 < HALF)
        tl.store(out + 4 * word + 2, without_bit(tl.sum(acc22 * fades, 0), 5, 79) + rest, mask=4 * word + 2 < HALF)
        tl.store(out + 4 * word + 3, without_bit(tl.sum(acc23 * fades, 0), 7, 79) + rest, mask=4 * word + 3 < HALF)
