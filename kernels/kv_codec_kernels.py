"""Device code of K/V rows at 8 and 4 bits (kernels/kv_codec.py), shared with attention over such rows."""

from __future__ import annotations

from ds_offload.kernels.triton_runtime import jit, tl


@jit
def centred_codes(codes, BITS: tl.constexpr):
    """Codes as float32, less N/2, exactly: without a conversion, which is several times slower than a sum."""
    # Bits 8 to 15 of a float32 of 2^15 count whole numbers.
    return ((codes.to(tl.int32) << 8) | 0x47000000).to(tl.float32, bitcast=True) - (32768.0 + (2**BITS - 1) / 2)


@jit
def code_halves(part, live, channel, BITS: tl.constexpr, HALF: tl.constexpr, ALIGNMENT: tl.constexpr):
    """Codes less N/2 of the channels of both halves, float32 [N, channels] each; `part` [N] points to K or V."""
    mask = live[:, None] & (channel < HALF)[None, :]
    # Rows are found at run time; without the hint it reads byte by byte.
    first = tl.multiple_of(part[:, None] + channel[None, :], [1, ALIGNMENT])
    codes = tl.load(first, mask=mask, other=0)
    if BITS == 4:
        low = codes & 15
        high = codes >> 4
    else:
        low = codes
        high = tl.load(part[:, None] + (HALF + channel)[None, :], mask=mask, other=0)
    return centred_codes(low, BITS), centred_codes(high, BITS)


@jit
def tail_number(tail, PLACE: tl.constexpr):
    """Number PLACE of 4 of float16 in an int64, as float32."""
    return ((tail >> (16 * PLACE)) & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@jit
def tail_numbers(part, live, PART_BYTES: tl.constexpr):
    """Centre and step of the first half, then of the second, float32 [N] each; 0 where not live."""
    tail = tl.load((part + (PART_BYTES - 8)).to(tl.pointer_type(tl.int64)), mask=live, other=0)
    return tail_number(tail, 0), tail_number(tail, 1), tail_number(tail, 2), tail_number(tail, 3)


@jit
def place_in(index, size1, size2, stride0, stride1, stride2):
    """Offset of flat `index` in a tensor of three leading dimensions."""
    last = index % size2
    rest = index // size2
    return (rest // size1).to(tl.int64) * stride0 + (rest % size1).to(tl.int64) * stride1 + last.to(tl.int64) * stride2


@jit
def to_float16(value, FLOAT16_MAX: tl.constexpr):
    """Rounded to float16, saturating."""
    return tl.minimum(tl.maximum(value, -FLOAT16_MAX), FLOAT16_MAX).to(tl.float16)


@jit
def encode_half(value, known, BITS: tl.constexpr, FLOAT16_MAX: tl.constexpr):
    """Codes int32 [N, channels] of one half, and its centre and step as float16 [N]."""
    N: tl.constexpr = 2**BITS - 1
    low = tl.min(tl.where(known, value, float("inf")), 1)
    high = tl.max(tl.where(known, value, float("-inf")), 1)
    centre = to_float16((low + high) / 2, FLOAT16_MAX)
    middle = centre.to(tl.float32)
    step = to_float16(tl.maximum(high - middle, middle - low) * (2 / N), FLOAT16_MAX)
    width = step.to(tl.float32)
    inverse = tl.where(width > 0, 1.0 / tl.where(width > 0, width, 1.0), 0.0)
    code = tl.floor((value - middle[:, None]) * inverse[:, None] + (N / 2 + 0.5))
    return tl.minimum(tl.maximum(code, 0.0), N).to(tl.int32), centre, step


@jit(do_not_specialize=["count", "size1", "size2"])
def encode_kernel(
    rows, coded, factor, count, size1, size2,
    rows0, rows1, rows2, rows_part, coded0, coded1, coded2, coded_part,
    factor0, factor1, factor2,
    BITS: tl.constexpr, HALF: tl.constexpr, HALF_PAD: tl.constexpr, PART_BYTES: tl.constexpr, TILE: tl.constexpr,
    FLOAT16_MAX: tl.constexpr,
):  # fmt: skip
    """One program quantises K (second program id 0) or V (1) of TILE rows."""
    index = tl.program_id(0) * TILE + tl.arange(0, TILE)
    is_value = tl.program_id(1)
    live = index < count
    index = tl.where(live, index, 0)
    channel = tl.arange(0, HALF_PAD)
    known = live[:, None] & (channel < HALF)[None, :]
    row = rows + place_in(index, size1, size2, rows0, rows1, rows2) + is_value * rows_part
    row = row[:, None] + channel[None, :]
    first = tl.load(row, mask=known, other=0.0).to(tl.float32)
    second = tl.load(row + HALF, mask=known, other=0.0).to(tl.float32)
    if is_value == 0:
        factors = (factor + place_in(index, size1, size2, factor0, factor1, factor2))[:, None] + channel[None, :]
        first = first / tl.load(factors, mask=known, other=1.0)
        second = second / tl.load(factors + HALF, mask=known, other=1.0)
    codes1, centre1, step1 = encode_half(first, known, BITS, FLOAT16_MAX)
    codes2, centre2, step2 = encode_half(second, known, BITS, FLOAT16_MAX)
    part = coded + place_in(index, size1, size2, coded0, coded1, coded2) + is_value * coded_part
    target = part[:, None] + channel[None, :]
    if BITS == 4:
        tl.store(target, (codes1 | (codes2 << 4)).to(tl.uint8), mask=known)
    else:
        tl.store(target, codes1.to(tl.uint8), mask=known)
        tl.store(target + HALF, codes2.to(tl.uint8), mask=known)
    tail = (part + (PART_BYTES - 8)).to(tl.pointer_type(tl.float16))
    tl.store(tail, centre1, mask=live)
    tl.store(tail + 1, step1, mask=live)
    tl.store(tail + 2, centre2, mask=live)
    tl.store(tail + 3, step2, mask=live)


@jit(do_not_specialize=["count", "size1", "size2"])
def decode_kernel(
    rows, coded, factor, count, size1, size2,
    rows0, rows1, rows2, rows_part, coded0, coded1, coded2, coded_part,
    factor0, factor1, factor2,
    BITS: tl.constexpr, HALF: tl.constexpr, HALF_PAD: tl.constexpr, PART_BYTES: tl.constexpr, TILE: tl.constexpr,
    FLOAT16_MAX: tl.constexpr,
):  # fmt: skip
    """One program brings K (second program id 0) or V (1) of TILE rows back."""
    index = tl.program_id(0) * TILE + tl.arange(0, TILE)
    is_value = tl.program_id(1)
    live = index < count
    index = tl.where(live, index, 0)
    channel = tl.arange(0, HALF_PAD)
    known = live[:, None] & (channel < HALF)[None, :]
    part = coded + place_in(index, size1, size2, coded0, coded1, coded2) + is_value * coded_part
    codes1, codes2 = code_halves(part, live, channel, BITS, HALF, 1)
    centre1, step1, centre2, step2 = tail_numbers(part, live, PART_BYTES)
    first = codes1 * step1[:, None] + centre1[:, None]
    second = codes2 * step2[:, None] + centre2[:, None]
    if is_value == 0:
        factors = (factor + place_in(index, size1, size2, factor0, factor1, factor2))[:, None] + channel[None, :]
        first = first * tl.load(factors, mask=known, other=1.0)
        second = second * tl.load(factors + HALF, mask=known, other=1.0)
    row = rows + place_in(index, size1, size2, rows0, rows1, rows2) + is_value * rows_part
    row = row[:, None] + channel[None, :]
    tl.store(row, first.to(rows.dtype.element_ty), mask=known)
    tl.store(row + HALF, second.to(rows.dtype.element_ty), mask=known)
