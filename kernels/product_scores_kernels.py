"""Device code of scores of product codes (kernels/product_scores.py): numbers of 8 bits, looked up and summed.

`entries_kernel` makes every head's numbers, `table_kernel` rounds them. It leaves for each pack of HEADS query heads
of a KV head a table [P, 16] of 32-bit words, each with the heads' numbers for a word of a part: one in a half of it
for one or two heads, one in a byte for three or four. So one read serves all of them. The 16 entries of a part stand
in 64 bytes: whatever entries the threads of a warp want, they lie in different banks or are the same.
"""

from __future__ import annotations

from ds_offload.kernels.label_scores_kernels import dot4, row_words
from ds_offload.kernels.triton_runtime import jit, tl


@jit(do_not_specialize=["stride_b", "stride_h", "stride_d"])
def entries_kernel(
    query,
    turn,
    words,
    entries,
    scaling,
    heads,
    stride_b,
    stride_h,
    stride_d,
    G: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    PARTS: tl.constexpr,
    EACH: tl.constexpr,
):
    """What every word of EACH parts adds to one query head's score: entries float32 [B * H, P, 16].

    The head's matrix is what takes the time, so its rows are shared out among many programs.
    """
    row = tl.program_id(0).to(tl.int64)
    b = row // heads
    h = row % heads // G
    part = tl.program_id(1) * EACH + tl.arange(0, EACH)
    there = part < PARTS
    channel = tl.arange(0, D_PAD)
    word = tl.arange(0, 16)
    source = query + b * stride_b + (row % heads) * stride_h + channel * stride_d
    value = tl.load(source, mask=channel < D, other=0.0).to(tl.float32) * scaling
    turn += h * D * D + part[:, None] * (4 * D) + channel[None, :]
    words += (h * PARTS + part)[:, None] * 64 + word[None, :] * 4
    inside = there[:, None] & (channel < D)[None, :]
    sums = tl.zeros([EACH, 16], tl.float32)
    for axis in tl.static_range(4):
        turned = tl.sum(tl.load(turn + axis * D, mask=inside, other=0.0) * value[None, :], 1)
        sums += turned[:, None] * tl.load(words + axis, mask=there[:, None], other=0.0)
    tl.store(entries + (row * PARTS + part)[:, None] * 16 + word[None, :], sums, mask=there[:, None])


@jit
def table_kernel(
    entries,
    table,
    factors,
    HEADS: tl.constexpr,
    PARTS: tl.constexpr,
    PARTS_PAD: tl.constexpr,
    LEAST_RANGE: tl.constexpr,
):
    """One pack's table out of its heads' entries, and each head's step and offset: factors [B * H, 2]."""
    pack = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS_PAD)
    there = part < PARTS
    at = part[:, None] * 16 + tl.arange(0, 16)[None, :]
    packed = tl.zeros([PARTS_PAD, 16], tl.int32)
    for g in tl.static_range(HEADS):
        row = pack * HEADS + g
        values = tl.load(entries + row * PARTS * 16 + at, mask=there[:, None], other=0.0)
        least = tl.min(values, 1)
        values -= least[:, None]
        peak = tl.maximum(tl.max(tl.max(values, 1), 0), LEAST_RANGE)
        numbers = tl.minimum(tl.floor(values * (255.0 / peak) + 0.5), 255.0).to(tl.int32)
        packed |= numbers << ((8 if HEADS > 2 else 16) * g)
        tl.store(factors + row * 2, peak * (1.0 / 255.0))
        tl.store(factors + row * 2 + 1, tl.sum(least, 0))
    tl.store(table + pack * PARTS * 16 + at, packed, mask=there[:, None])


@jit
def pack_sums(words, table, PARTS: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, PTX: tl.constexpr):
    """Sums of the pack's numbers over the parts of labels: two int32 [BLOCK] that hold heads in their halves.

    One or two heads are in the first of them, of more the even ones in the first and the odd ones in the second.

    A lookup's address takes one instruction, and none of those that shift and mask, of which a device does half as
    many: `dot4` picks one of four words, times the 4 bytes of an entry, and adds it to the low half of the address.
    A part's 64 bytes begin at a multiple of 64, so nothing is carried into the high half.
    """
    address = table.to(tl.uint64)
    low = address.to(tl.int32)
    high = (address >> 32) << 32
    total = tl.zeros([BLOCK], tl.int32)
    even = tl.zeros([BLOCK], tl.int32)
    last = tl.zeros([BLOCK], tl.int32)
    for part in tl.static_range(PARTS):
        numbers = (words[part // 8] >> (4 * (part % 2))) & 0x0F0F0F0F
        place = dot4(numbers, tl.full([], 4 << (8 * (part % 8 // 2)), tl.int32), low, PTX)
        entry = tl.load((high | place.to(tl.uint32)).to(tl.pointer_type(tl.int32)) + part * 16)
        total += entry
        if HEADS > 2:
            even += entry & 0x00FF00FF
        if HEADS > 3:
            # The sum of the highest bytes does not fit above the others'.
            last = dot4(entry, tl.full([], 1 << 24, tl.int32), last, PTX)
    if HEADS <= 2:
        return total, even
    else:  # noqa: RET505 - the branch is chosen when it is compiled
        return even, ((total - even - (last << 24)) >> 8) | (last << 16)


@jit
def head_sum(even, odd, g: tl.constexpr, HEADS: tl.constexpr):
    """Head g's sum out of those of its pack: int32."""
    if HEADS <= 2:
        return (even >> (16 * g)) & 0xFFFF
    else:  # noqa: RET505
        both = even if g % 2 == 0 else odd
        return (both >> (16 * (g // 2))) & 0xFFFF


@jit(do_not_specialize=["labels", "head_stride", "max_length"])
def scores_kernel(
    labels,
    table,
    factors,
    starts,
    lengths,
    out,
    head_stride,
    kv_heads,
    max_length,
    PARTS: tl.constexpr,
    ROW_WORDS: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    PTX: tl.constexpr,
):
    """Scores of one block of tokens with one query head per KV head: out [B, Hkv, max_length], int16: the sums."""
    WHOLE: tl.constexpr = out.dtype.element_ty == tl.int16
    first = tl.program_id(0).to(tl.int64) * BLOCK
    pair = tl.program_id(1).to(tl.int64)
    start = tl.load(starts + pair // kv_heads)
    length = tl.load(lengths + pair // kv_heads)
    token = first + tl.arange(0, BLOCK)
    live = token < length
    labels += (pair % kv_heads) * head_stride
    scores = tl.full([BLOCK], -1 if WHOLE else float("-inf"), out.dtype.element_ty)
    if first < length:
        rows = labels.to(tl.pointer_type(tl.uint32)) + (start + token) * ROW_WORDS
        words = row_words(rows, live, ROW_WORDS, VECTOR, BLOCK)
        sums, _ = pack_sums(words, table + pair * PARTS * 16, PARTS, 1, BLOCK, PTX)
        if WHOLE:
            scores = tl.where(live, sums, -1).to(tl.int16)
        else:
            step = tl.load(factors + pair * 2)
            scores = tl.where(live, sums.to(tl.float32) * step + tl.load(factors + pair * 2 + 1), float("-inf"))
    tl.store(out + pair * max_length + token, scores, mask=token < max_length)


@jit(do_not_specialize=["labels", "head_stride", "group", "blocks", "sums_stride"])
def sums_kernel(
    labels,
    table,
    factors,
    starts,
    lengths,
    sums,
    partials,
    head_stride,
    kv_heads,
    group,
    blocks,
    sums_stride,
    PARTS: tl.constexpr,
    ROW_WORDS: tl.constexpr,
    HEADS: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    PTX: tl.constexpr,
):
    """Sums of one block of tokens for one pack: sums int16 [B * H, sums_stride]; peak and sum of its weights.

    Partials are [B * H, 2, blocks], as in kernels/label_scores_kernels.py. Blocks without
    tokens are left as they are: nothing reads them.
    """
    block = tl.program_id(0).to(tl.int64)
    pair = tl.program_id(1).to(tl.int64)
    pack = pair * tl.num_programs(2) + tl.program_id(2)
    start = tl.load(starts + pair // kv_heads)
    length = tl.load(lengths + pair // kv_heads)
    token = block * BLOCK + tl.arange(0, BLOCK)
    live = token < length
    labels += (pair % kv_heads) * head_stride
    if block * BLOCK < length:
        rows = labels.to(tl.pointer_type(tl.uint32)) + (start + token) * ROW_WORDS
        words = row_words(rows, live, ROW_WORDS, VECTOR, BLOCK)
        even, odd = pack_sums(words, table + pack * PARTS * 16, PARTS, HEADS, BLOCK, PTX)
        for g in tl.static_range(HEADS):
            # Not pack * HEADS + g: where a head's sums are known to be aligned, the compiler stores several of a
            # thread at once, and to bring them there exchanges every entry between threads.
            head = pair * group + tl.program_id(2) * HEADS + g
            total = head_sum(even, odd, g, HEADS)
            tl.store(sums + head * sums_stride + token, total.to(tl.int16), mask=live)
            step = tl.load(factors + head * 2)
            scores = tl.where(live, total.to(tl.float32) * step + tl.load(factors + head * 2 + 1), float("-inf"))
            peak = tl.max(scores, 0)
            target = partials + head * 2 * blocks + block
            tl.store(target, peak)
            tl.store(target + blocks, tl.sum(tl.exp2(scores - peak), 0))


@jit(do_not_specialize=["sums_stride", "max_length"])
def weights_kernel(
    sums,
    factors,
    lengths,
    totals,
    out,
    kv_heads,
    sums_stride,
    max_length,
    G: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Weights of one block of tokens, summed over the G heads of a group: out [B, Hkv, max_length]."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    pair = tl.program_id(1).to(tl.int64)
    length = tl.load(lengths + pair // kv_heads)
    token = first + tl.arange(0, BLOCK)
    live = token < length
    weights = tl.zeros([BLOCK], tl.float32)
    if first < length:
        for g in range(G):
            head = pair * G + g
            total = tl.load(sums + head * sums_stride + token, mask=live, other=0).to(tl.float32)
            scores = total * tl.load(factors + head * 2) + tl.load(factors + head * 2 + 1)
            weight = tl.exp2(scores - tl.load(totals + head * 2)) * tl.load(totals + head * 2 + 1)
            weights += tl.where(live, weight, 0.0)
    tl.store(out + pair * max_length + token, weights, mask=token < max_length)
