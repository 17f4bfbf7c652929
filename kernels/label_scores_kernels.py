"""Device code of label scores (kernels/label_scores.py): packed labels times a query of int8.

Labels of 8, 4 and 2 bits are never decoded. A 32-bit word of codes, masked in place, holds
four channels in its four bytes; `dp4a` multiplies them with four bytes of the query and adds
the products up in an int32, exactly. Field m of every byte is worth 2 ** (bits * m), which
the sums keep until the end.

`arrange_kernel` leaves for each query head SIZE words of 32 bits. For labels below 16 bits
they are, with PER channels to a byte:

* PER * WORDS words of int8: byte k of word m * WORDS + w is the query of the channel whose
  code is field m of byte k of word w of a row, and 0 where there is none;
* the float32 factor that makes a score of `coded_dots`, but for the label's scale;
* the int32 constant that `coded_dots` subtracts.

For 16 bits they are the query's kept channels, float32, times the scaling.
"""

from __future__ import annotations

from ds_offload.kernels.dependent_launch import follow, step_kernel
from ds_offload.kernels.label_rows import row_words
from ds_offload.kernels.triton_runtime import jit, tl


@step_kernel(do_not_specialize=["stride_b", "stride_h", "stride_d"])
def arrange_kernel(
    query,
    channels,
    out,
    scaling,
    heads,
    stride_b,
    stride_h,
    stride_d,
    G: tl.constexpr,
    R: tl.constexpr,
    BITS: tl.constexpr,
    PER: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_PAD: tl.constexpr,
    SIZE: tl.constexpr,
    LEAST_PEAK: tl.constexpr,
):
    """One query head: gathers its kept channels, quantises and arranges them. WIDTH is a row's bytes, or its halves."""
    follow()
    row = tl.program_id(0).to(tl.int64)
    head = row % heads
    slot = tl.arange(0, PER)[:, None]
    place = tl.arange(0, WIDTH_PAD)[None, :]
    channel = place * PER + slot
    kept = tl.load(channels + (head // G) * R + channel, mask=channel < R, other=0)
    values = query + (row // heads) * stride_b + head * stride_h + kept * stride_d
    value = tl.load(values, mask=channel < R, other=0.0).to(tl.float32)
    out += row * SIZE
    if BITS == 16:
        tl.store(out.to(tl.pointer_type(tl.float32)) + place + 0 * slot, value * scaling, mask=place < WIDTH)
    else:
        peak = tl.maximum(tl.max(tl.max(tl.abs(value), 1), 0), LEAST_PEAK)
        # Adding and taking away 1.5 * 2 ** 23 rounds to the nearest whole number, ties to even.
        code = value * tl.div_rn(tl.full([], 127.0, tl.float32), peak)
        code = ((code + 12582912.0) - 12582912.0).to(tl.int32)
        tl.store(
            out.to(tl.pointer_type(tl.int8)) + slot * WIDTH + place,
            code.to(tl.int8),
            mask=place < WIDTH,
        )
        total = tl.sum(tl.sum(code, 1), 0)
        tl.store((out + (SIZE - 2)).to(tl.pointer_type(tl.float32)), peak * scaling)
        tl.store(out + (SIZE - 1), total * ((2**BITS - 1) * 2 ** (8 - BITS)))


@jit
def dot4(codes, query, acc, PTX: tl.constexpr):
    """acc plus the products of four unsigned bytes of `codes` with four signed ones of `query`."""
    if PTX:
        acc = tl.inline_asm_elementwise(
            "dp4a.u32.s32 $0, $1, $2, $3;", "=r,r,r,r", [codes, query, acc], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        for byte in tl.static_range(4):
            acc += ((codes >> (8 * byte)) & 255).to(tl.int32) * ((query << (24 - 8 * byte)) >> 24)
    return acc


@jit
def coded_dots(words, query, BITS: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr, PTX: tl.constexpr):
    """2 ** (8 - BITS) * sum of q_j * (2 c_j - n) over the channels, for one arranged query: int32 [BLOCK], exact."""
    PER: tl.constexpr = 8 // BITS
    dots = tl.zeros([BLOCK], tl.int32)
    for field in tl.static_range(PER):
        sums = tl.zeros([BLOCK], tl.int32)
        for word in tl.static_range(WORDS):
            codes = words[word] & ((0x01010101 * (2**BITS - 1)) << (BITS * field))
            sums = dot4(codes, tl.load(query + (field * WORDS + word)), sums, PTX)
        dots = dots * 2**BITS + sums
    return dots * 2 - tl.load(query + (PER * WORDS + 1))


@jit
def float16_dots(words, query, WORDS: tl.constexpr, BLOCK: tl.constexpr):
    """Products of float16 rows, two values to a word, with one arranged query: float32 [BLOCK]."""
    query = query.to(tl.pointer_type(tl.float32))
    dots = tl.zeros([BLOCK], tl.float32)
    for word in tl.static_range(WORDS):
        low = (words[word] & 65535).to(tl.uint16).to(tl.float16, bitcast=True)
        high = (words[word] >> 16).to(tl.uint16).to(tl.float16, bitcast=True)
        dots += low.to(tl.float32) * tl.load(query + 2 * word)
        dots += high.to(tl.float32) * tl.load(query + (2 * word + 1))
    return dots


@jit
def label_rows(labels, row, live, BITS: tl.constexpr, WORDS: tl.constexpr, VECTOR: tl.constexpr):
    """What all heads share of the labels at `row` [BLOCK] int64: their words, and their scales float32 [BLOCK]."""
    BLOCK: tl.constexpr = live.shape[0]
    words = row_words(labels.to(tl.pointer_type(tl.uint32)) + row * WORDS, live, WORDS, VECTOR, BLOCK)
    if BITS == 16:
        scale = tl.full([BLOCK], 1.0, tl.float32)
    else:
        step = (words[WORDS - 1] >> 24).to(tl.int32).to(tl.float32)
        scale = tl.exp2((step - 128.0) * (1.0 / 12.0))
    return words, scale


@jit
def head_scores(words, scale, live, query, BITS: tl.constexpr, WORDS: tl.constexpr, PTX: tl.constexpr):
    """Scores of labels from `label_rows` against one arranged query: float32 [BLOCK], -inf where not live."""
    BLOCK: tl.constexpr = live.shape[0]
    if BITS == 16:
        scores = float16_dots(words, query, WORDS, BLOCK)
    else:
        factor = tl.load((query + 8 // BITS * WORDS).to(tl.pointer_type(tl.float32)))
        scores = coded_dots(words, query, BITS, WORDS, BLOCK, PTX).to(tl.float32) * factor * scale
    return tl.where(live, scores, float("-inf"))


@step_kernel(do_not_specialize=["labels", "head_stride", "max_length"])
def scores_kernel(
    labels,
    query,
    starts,
    lengths,
    out,
    head_stride,
    kv_heads,
    max_length,
    BITS: tl.constexpr,
    WORDS: tl.constexpr,
    SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    PTX: tl.constexpr,
):
    """Scores of one block of tokens for HEADS heads of a group: out [B, H, max_length]."""
    follow()
    first = tl.program_id(0).to(tl.int64) * BLOCK
    pair = tl.program_id(1).to(tl.int64)
    head = (pair * tl.num_programs(2) + tl.program_id(2)) * HEADS
    start = tl.load(starts + pair // kv_heads)
    length = tl.load(lengths + pair // kv_heads)
    token = first + tl.arange(0, BLOCK)
    live = token < length
    labels += (pair % kv_heads) * head_stride
    out += head * max_length + token
    if first < length:
        words, scale = label_rows(labels, start + token, live, BITS, WORDS, VECTOR)
        for g in tl.static_range(HEADS):
            scores = head_scores(words, scale, live, query + (head + g) * SIZE, BITS, WORDS, PTX)
            tl.store(out + g * max_length, scores, mask=token < max_length)
    else:
        for g in tl.static_range(HEADS):
            tl.store(out + g * max_length, tl.full([BLOCK], float("-inf"), tl.float32), mask=token < max_length)


@step_kernel(do_not_specialize=["labels", "head_stride", "blocks"])
def partials_kernel(
    labels,
    query,
    starts,
    lengths,
    partials,
    head_stride,
    kv_heads,
    blocks,
    BITS: tl.constexpr,
    WORDS: tl.constexpr,
    SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    PTX: tl.constexpr,
):
    """Peak and sum of 2 ** (score - peak) of one block, for HEADS heads: partials [B * H, 2, blocks].

    Blocks without tokens are left as they are: `totals_kernel` does not read them.
    """
    follow()
    block = tl.program_id(0).to(tl.int64)
    pair = tl.program_id(1).to(tl.int64)
    head = (pair * tl.num_programs(2) + tl.program_id(2)) * HEADS
    start = tl.load(starts + pair // kv_heads)
    length = tl.load(lengths + pair // kv_heads)
    token = block * BLOCK + tl.arange(0, BLOCK)
    live = token < length
    labels += (pair % kv_heads) * head_stride
    if block * BLOCK < length:
        words, scale = label_rows(labels, start + token, live, BITS, WORDS, VECTOR)
        for g in tl.static_range(HEADS):
            scores = head_scores(words, scale, live, query + (head + g) * SIZE, BITS, WORDS, PTX)
            peak = tl.max(scores, 0)
            target = partials + (head + g) * 2 * blocks + block
            tl.store(target, peak)
            tl.store(target + blocks, tl.sum(tl.exp2(scores - peak), 0))


@step_kernel(do_not_specialize=["blocks"])
def totals_kernel(partials, lengths, totals, heads, blocks, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """A head's peak and one over its sum of 2 ** (score - peak), from its blocks in a fixed order: [B * H, 2]."""
    follow()
    head = tl.program_id(0).to(tl.int64)
    used = (tl.load(lengths + head // heads) + (BLOCK - 1)) // BLOCK
    partials += head * 2 * blocks
    column = tl.arange(0, WIDTH)
    peaks = tl.full([WIDTH], float("-inf"), tl.float32)
    for first in range(0, used, WIDTH):
        peaks = tl.maximum(peaks, tl.load(partials + first + column, mask=first + column < used, other=float("-inf")))
    peak = tl.max(peaks, 0)
    sums = tl.zeros([WIDTH], tl.float32)
    for first in range(0, used, WIDTH):
        inside = first + column < used
        weight = tl.exp2(tl.load(partials + first + column, mask=inside, other=float("-inf")) - peak)
        sums += tl.where(inside, weight * tl.load(partials + blocks + first + column, mask=inside, other=0.0), 0.0)
    tl.store(totals + head * 2, peak)
    tl.store(totals + head * 2 + 1, 1.0 / tl.where(used > 0, tl.sum(sums, 0), 1.0))


@step_kernel(do_not_specialize=["labels", "head_stride", "max_length"])
def weights_kernel(
    labels,
    query,
    starts,
    lengths,
    totals,
    out,
    head_stride,
    kv_heads,
    max_length,
    BITS: tl.constexpr,
    WORDS: tl.constexpr,
    SIZE: tl.constexpr,
    G: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    PTX: tl.constexpr,
):
    """Weights of one block of tokens, summed over the G heads of a group: out [B, Hkv, max_length]."""
    follow()
    first = tl.program_id(0).to(tl.int64) * BLOCK
    pair = tl.program_id(1).to(tl.int64)
    start = tl.load(starts + pair // kv_heads)
    length = tl.load(lengths + pair // kv_heads)
    token = first + tl.arange(0, BLOCK)
    live = token < length
    labels += (pair % kv_heads) * head_stride
    weights = tl.zeros([BLOCK], tl.float32)
    if first < length:
        words, scale = label_rows(labels, start + token, live, BITS, WORDS, VECTOR)
        for g in range(G):
            head = pair * G + g
            scores = head_scores(words, scale, live, query + head * SIZE, BITS, WORDS, PTX)
            peak = tl.load(totals + head * 2)
            weights += tl.exp2(scores - peak) * tl.load(totals + head * 2 + 1)
    tl.store(out + pair * max_length + token, weights, mask=token < max_length)
