"""Device code of the product code of labels (kernels/product_code.py)."""

from __future__ import annotations

from ds_offload.kernels.triton_runtime import jit, tl


@jit
def halves(value, dtype: tl.constexpr):
    """float32 as the sum of two numbers of 16 bits: what the first leaves is in the second."""
    high = value.to(dtype)
    return high, (value - high.to(tl.float32)).to(dtype)


@jit(do_not_specialize=["labels", "stride_h", "stride_t", "stride_d", "head_stride", "tokens"])
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
    PARTS: tl.constexpr,
    ROW_WORDS: tl.constexpr,
    EACH: tl.constexpr,
    HALVES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One 32-bit word of the labels of BLOCK tokens of one KV head: the nearest words of eight parts.

    The key's 32 axes are one product, their products with all words of the eight parts
    another, with a matrix that is zero but for each part's own axes. Both run on the tensor cores: keys of 16 bits,
    which are exact there, with both halves of what they are multiplied with (`halves`), others in three passes of
    float32's precision.
    """
    h = tl.program_id(1).to(tl.int64)
    place = tl.program_id(2)
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = token < tokens
    keys += h * stride_h + token[:, None] * stride_t
    basis += h * D * D
    axis = place * 32 + tl.arange(0, 32)
    axes = tl.zeros([BLOCK, 32], tl.float32)
    middle = tl.zeros([32], tl.float32)
    for first in range(0, D, 32):
        channel = first + tl.arange(0, 32)
        inside = channel < D
        key = tl.load(keys + channel[None, :] * stride_d, mask=live[:, None] & inside[None, :], other=0.0)
        average = tl.load(mean + h * D + channel, mask=inside, other=0.0)
        columns = basis + channel[:, None] * D + axis[None, :]
        turned = tl.load(columns, mask=inside[:, None] & (axis < D)[None, :], other=0.0)
        if HALVES:
            high, low = halves(turned, key.dtype)
            axes = tl.dot(key, high, axes)
            axes = tl.dot(key, low, axes)
            middle += tl.sum(average[:, None] * turned, 0)
        else:
            axes = tl.dot(key.to(tl.float32) - average[None, :], turned, axes, input_precision="tf32x3")
    axes -= middle[None, :]
    # Column part * 16 + number of a matrix [32, 128], row part * 4 + axis.
    row = tl.arange(0, 32)
    column = tl.arange(0, 128)
    part = place * 8 + column // 16
    word = words + (h * PARTS + part) * 64 + (column % 16) * 4
    own = (row[:, None] // 4 == (column // 16)[None, :]) & (part < PARTS)[None, :]
    matrix = tl.load(word[None, :] + (row % 4)[:, None], mask=own, other=0.0)
    half_norms = 0.5 * tl.sum(matrix * matrix, 0)
    if HALVES:
        high, low = halves(matrix, tl.bfloat16)
        axes_high, axes_low = halves(axes, tl.bfloat16)
        products = tl.dot(axes_high, high)
        products = tl.dot(axes_high, low, products)
        products = tl.dot(axes_low, high, products)
    else:
        products = tl.dot(axes, matrix, input_precision="tf32x3")
    # The order of floats as whole numbers, whose last bits are the word's number: one minimum finds both.
    bits = (half_norms[None, :] - products).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    numbered = (ordered & ~15) | (column % 16)[None, :]
    nearest = tl.min(tl.reshape(numbered, [BLOCK, 8, 16]), 2) & 15
    shift = tl.arange(0, 8)
    nearest = tl.where((place * 8 + shift < PARTS)[None, :], nearest, 0)
    packed = tl.sum(nearest << (4 * shift)[None, :], 1)
    at = token
    if EACH:
        at = tl.load(starts + token, mask=live, other=0) + tl.load(positions + token, mask=live, other=0)
    target = (labels + h * head_stride).to(tl.pointer_type(tl.int32)) + at * ROW_WORDS + place
    tl.store(target, packed, mask=live)
