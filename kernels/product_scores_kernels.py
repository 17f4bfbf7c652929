"""Device code of scores of product codes (kernels/product_scores.py): whole numbers, looked up and summed.

`entries_kernel` makes every head's numbers, `table_kernel` rounds them. It leaves for each pack of HEADS query heads
of a KV head a table [P, 16] of 32-bit words, each with the heads' numbers for a word of a part: one in a half of it
for one or two heads, one in a byte for three or four. So one read serves all of them. The 16 entries of a part stand
in 64 bytes: whatever entries the threads of a warp want, they lie in different banks or are the same.
"""

from __future__ import annotations

from ds_offload.kernels.dependent_launch import follow, step_kernel
from ds_offload.kernels.label_rows import row_words
from ds_offload.kernels.triton_runtime import jit, tl


@step_kernel(do_not_specialize=["stride_b", "stride_h", "stride_d"])
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
    follow()
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


@step_kernel
def table_kernel(
    entries,
    table,
    factors,
    HEADS: tl.constexpr,
    PARTS: tl.constexpr,
    PARTS_PAD: tl.constexpr,
    LARGEST: tl.constexpr,
    LEAST_RANGE: tl.constexpr,
):
    """One pack's table out of its heads' entries, and each head's step and offset: factors [B * H, 2]."""
    follow()
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
        numbers = tl.minimum(tl.floor(values * (LARGEST / peak) + 0.5), LARGEST).to(tl.int32)
        packed |= numbers << ((8 if HEADS > 2 else 16) * g)
        tl.store(factors + row * 2, peak * (1.0 / LARGEST))
        tl.store(factors + row * 2 + 1, tl.sum(least, 0))
    tl.store(table + pack * PARTS * 16 + at, packed, mask=there[:, None])


@jit
def pack_sums(words, table, PARTS: tl.constexpr, HEADS: tl.constexpr, LOOKUP: tl.constexpr, EACH: tl.constexpr):
    """Sums of the pack's numbers over the parts of labels: one or two int32 [BLOCK], a tuple for `head_sum`.

    LOOKUP is `lookup_ptx` for EACH tokens of a thread; Triton's interpreter, which has no PTX, is given "".
    """
    # As many as `sum_words` says.
    RESULTS: tl.constexpr = 2 if HEADS > 2 else 1
    address = (table.to(tl.uint64),)
    OPERANDS: tl.constexpr = "=&r," * (RESULTS * EACH) + "r," * (len(words) * EACH) + "l," * (EACH - 1) + "l"
    if LOOKUP == "":
        first = tl.zeros_like(words[0]).to(tl.int32)
        second = first
        for part in tl.static_range(PARTS):
            entry = tl.load(table + part * 16 + ((words[part // 8] >> (4 * (part % 8))) & 15).to(tl.int32))
            first += entry & 0x00FF00FF if HEADS > 2 else entry
            second += (entry >> 8) & 0x00FF00FF
        return (first, second) if HEADS > 2 else (first,)
    elif HEADS > 2:  # noqa: RET505 - the branch is chosen when it is compiled
        return tl.inline_asm_elementwise(
            *(LOOKUP, OPERANDS, words + address), dtype=(tl.int32, tl.int32), is_pure=False, pack=EACH
        )
    else:
        sums = tl.inline_asm_elementwise(*(LOOKUP, OPERANDS, words + address), dtype=tl.int32, is_pure=False, pack=EACH)
        return (sums,)


@jit
def head_sum(packed, g: tl.constexpr, HEADS: tl.constexpr):
    """Head g's sum out of those of its pack: int32.

    A word has two heads in its halves: heads 0 and 1 of up to two; of more, the even ones in the first word and the
    odd ones in the second.
    """
    if HEADS > 2:
        return (packed[g % 2] >> (16 * (g // 2))) & 0xFFFF
    else:  # noqa: RET505
        return (packed[0] >> (16 * g)) & 0xFFFF


@jit
def store_row(out, row, token, length, values, ALIGNMENT: tl.constexpr):
    """Store values of a row's tokens, those below its length; ALIGNMENT bytes divide where each row begins."""
    ELEMENTS: tl.constexpr = ALIGNMENT * 8 // out.dtype.element_ty.primitive_bitwidth
    # The length is a multiple of ELEMENTS; seeing that, the compiler stores as many at a time.
    inside = token < length // ELEMENTS * ELEMENTS
    tl.store(tl.multiple_of(out + row * length + token, ALIGNMENT), values, mask=inside)


@step_kernel(do_not_specialize=["labels", "head_stride", "max_length"])
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
    ALIGNMENT: tl.constexpr,
    LOOKUP: tl.constexpr,
    EACH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Scores of one block of tokens with one query head per KV head: out [B, Hkv, max_length], int16: the sums."""
    follow()
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
        packed = pack_sums(words, table + pair * PARTS * 16, PARTS, 1, LOOKUP, EACH)
        if WHOLE:
            scores = tl.where(live, packed[0], -1).to(tl.int16)
        else:
            step = tl.load(factors + pair * 2)
            score = packed[0].to(tl.float32) * step + tl.load(factors + pair * 2 + 1)
            scores = tl.where(live, score, float("-inf"))
    store_row(out, pair, token, max_length, scores, ALIGNMENT)


@step_kernel(do_not_specialize=["labels", "head_stride", "group", "blocks", "sums_stride"])
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
    LOOKUP: tl.constexpr,
    EACH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums of one block of tokens for one pack: sums [packs, words, sums_stride]; peak and sum of each head's weights.

    Partials are [B * H, 2, blocks], as in kernels/label_scores_kernels.py. Blocks without
    tokens are left as they are: nothing reads them.
    """
    follow()
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
        packed = pack_sums(words, table + pack * PARTS * 16, PARTS, HEADS, LOOKUP, EACH)
        # Where sums begin is not told to be aligned: the compiler would store several of a thread at once, and to bring
        # them there exchange all of a program's labels between its threads.
        target = sums + pack * len(packed) * sums_stride + token
        for n in tl.static_range(len(packed)):
            tl.store(target + n * sums_stride, packed[n].to(sums.dtype.element_ty), mask=live)
        for g in tl.static_range(HEADS):
            head = pack * HEADS + g
            number = head_sum(packed, g, HEADS)
            most = tl.max(tl.where(live, number, 0), 0)
            step = tl.load(factors + head * 2)
            weight = tl.exp2((number - most).to(tl.float32) * step)
            partial = partials + head * 2 * blocks + block
            tl.store(partial, most.to(tl.float32) * step + tl.load(factors + head * 2 + 1))
            tl.store(partial + blocks, tl.sum(tl.where(live, weight, 0.0), 0))


@jit
def log2(value, PTX: tl.constexpr):
    """The binary logarithm, about as exact as the device has it in one instruction."""
    if PTX:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=r,r", [value], dtype=tl.float32, is_pure=True, pack=1
        )
    else:  # noqa: RET505
        return tl.log2(value)


@step_kernel(do_not_specialize=["max_length"])
def weights_kernel(
    sums,
    factors,
    lengths,
    totals,
    out,
    kv_heads,
    sums_stride,
    max_length,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    OCTAVE: tl.constexpr,
    HIGHEST: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK: tl.constexpr,
    PTX: tl.constexpr,
):
    """Weights of one block of tokens, summed over a group: out [B, Hkv, max_length], int16: their logarithms."""
    follow()
    WORDS: tl.constexpr = 2 if HEADS > 2 else 1
    first = tl.program_id(0).to(tl.int64) * BLOCK
    pair = tl.program_id(1).to(tl.int64)
    length = tl.load(lengths + pair // kv_heads)
    token = first + tl.arange(0, BLOCK)
    live = token < length
    # What lies behind a row's sums is read, too, and not used: so the compiler loads several at once.
    there = token < sums_stride
    weights = tl.zeros([BLOCK], tl.float32)
    if first < length:
        for pack in range(GROUP // HEADS):
            row = (pair * (GROUP // HEADS) + pack) * WORDS
            source = sums + row * sums_stride + token
            even = tl.load(source, mask=there, other=0).to(tl.int32)
            odd = even
            if WORDS == 2:
                odd = tl.load(source + sums_stride, mask=there, other=0).to(tl.int32)
            for g in tl.static_range(HEADS):
                head = pair * GROUP + pack * HEADS + g
                lift = tl.load(factors + head * 2 + 1) - tl.load(totals + head * 2)
                lift += log2(tl.load(totals + head * 2 + 1), PTX)
                # As the last bits of 2 ** 23: a device makes a quarter as many floats of whole numbers of 16 bits.
                number = (head_sum((even, odd), g, HEADS) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0
                weights += tl.exp2(number * tl.load(factors + head * 2) + lift)
    if out.dtype.element_ty == tl.int16:
        # Nothing is above the group's number of heads, and of weights too small for a float the logarithm is -inf.
        number = (log2(weights, PTX) - log2(tl.full([1], GROUP, tl.float32), PTX)) * OCTAVE + HIGHEST
        number = tl.minimum(tl.maximum(number, 0.0), HIGHEST).to(tl.int16)
        store_row(out, pair, token, max_length, tl.where(live, number, -1), ALIGNMENT)
    else:
        store_row(out, pair, token, max_length, tl.where(live, weights, 0.0), ALIGNMENT)
