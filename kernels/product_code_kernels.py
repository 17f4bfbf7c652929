"""Device code of the product code of labels (kernels/product_code.py)."""

from __future__ import annotations

from ds_offload.kernels.dependent_launch import follow, step_kernel
from ds_offload.kernels.triton_runtime import jit, tl


@jit
def halves(value, dtype: tl.constexpr):
    """float32 as the sum of two numbers of 16 bits: what the first leaves is in the second."""
    high = value.to(dtype)
    return high, (value - high.to(tl.float32)).to(dtype)


@step_kernel(do_not_specialize=["labels", "stride_h", "stride_t", "head_stride", "tokens"])
def encode_kernel(
    keys,
    stride_h,
    stride_t,
    stride_d,
    mean,
    basis,
    words,
    starts,
    positions,
    labels,
    head_stride,
    tokens,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    PARTS: tl.constexpr,
    ROW_WORDS: tl.constexpr,
    EACH: tl.constexpr,
    HALVES: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    """One 32-bit word of the labels of BLOCKS x BLOCK tokens of one KV head: the nearest words of eight parts.

    Programs of one head's tokens, a word each, are neighbours, so their keys come from memory once. A key begins at a
    multiple of ALIGNMENT bytes. The key's 32 axes are one product, their products with all words of the eight parts
    another, with a matrix that is zero but for each part's own axes. Both run on the tensor cores: keys of 16 bits,
    which are exact there, with both halves of what they are multiplied with (`halves`), others in three passes of
    float32's precision.
    """
    follow()
    h = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) % ROW_WORDS
    first = (tl.program_id(0) // ROW_WORDS).to(tl.int64) * BLOCKS
    channel = tl.arange(0, D_PAD)
    inside = channel < D
    axis = place * 32 + tl.arange(0, 32)
    columns = basis + h * D * D + channel[:, None] * D + axis[None, :]
    turn = tl.load(columns, mask=inside[:, None] & (axis < D)[None, :], other=0.0)
    average = tl.load(mean + h * D + channel, mask=inside, other=0.0)
    middle = tl.sum(average[:, None] * turn, 0)
    # Column part * 16 + number of a matrix [32, 128], row part * 4 + axis.
    row = tl.arange(0, 32)
    column = tl.arange(0, 128)
    part = place * 8 + column // 16
    word = words + (h * PARTS + part) * 64 + (column % 16) * 4
    own = (row[:, None] // 4 == (column // 16)[None, :]) & (part < PARTS)[None, :]
    matrix = tl.load(word[None, :] + (row % 4)[:, None], mask=own, other=0.0)
    half_norms = 0.5 * tl.sum(matrix * matrix, 0)
    if HALVES:
        turn_high, turn_low = halves(turn, keys.dtype.element_ty)
        high, low = halves(matrix, tl.bfloat16)
    shift = tl.arange(0, 8)
    keys += h * stride_h + channel[None, :] * stride_d
    target = (labels + h * head_stride).to(tl.pointer_type(tl.int32)) + place
    for number in range(BLOCKS):
        token = (first + number) * BLOCK + tl.arange(0, BLOCK)
        live = token < tokens
        # Strides are not known when it is compiled: without the hint it would be read channel by channel.
        pointers = tl.multiple_of(keys + token[:, None] * stride_t, [1, ALIGNMENT])
        key = tl.load(pointers, mask=live[:, None] & inside[None, :], other=0.0)
        if HALVES:
            axes = tl.dot(key, turn_high)
            axes = tl.dot(key, turn_low, axes) - middle[None, :]
            axes_high, axes_low = halves(axes, tl.bfloat16)
            products = tl.dot(axes_high, high)
            products = tl.dot(axes_high, low, products)
            products = tl.dot(axes_low, high, products)
        else:
            axes = tl.dot(key.to(tl.float32) - average[None, :], turn, input_precision="tf32x3")
            products = tl.dot(axes, matrix, input_precision="tf32x3")
        # The order of floats as whole numbers, whose last bits are the word's number: one minimum finds both.
        bits = (half_norms[None, :] - products).to(tl.int32, bitcast=True)
        ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        numbered = (ordered & ~15) | (column % 16)[None, :]
        nearest = tl.min(tl.reshape(numbered, [BLOCK, 8, 16]), 2) & 15
        nearest = tl.where((place * 8 + shift < PARTS)[None, :], nearest, 0)
        packed = tl.sum(nearest << (4 * shift)[None, :], 1)
        at = token
        if EACH:
            at = tl.load(starts + token, mask=live, other=0) + tl.load(positions + token, mask=live, other=0)
        tl.store(target + at * ROW_WORDS, packed, mask=live)
