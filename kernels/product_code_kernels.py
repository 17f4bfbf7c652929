"""Device code of the product code of labels (kernels/product_code.py)."""

from __future__ import annotations

from ds_offload.kernels.triton_runtime import jit, tl


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
    BLOCK: tl.constexpr,
):
    """One 32-bit word of the labels of BLOCK tokens of one KV head: the nearest words of eight parts.

    The key's 32 axes are one product, their products with all words of the eight parts
    another, with a matrix that is zero but for each part's own axes. Both are of float32's
    precision on the tensor cores, in three passes.
    """
    h = tl.program_id(1).to(tl.int64)
    place = tl.program_id(2)
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = token < tokens
    keys += h * stride_h + token[:, None] * stride_t
    basis += h * D * D
    axis = place * 32 + tl.arange(0, 32)
    axes = tl.zeros([BLOCK, 32], tl.float32)
    for first in range(0, D, 32):
        channel = first + tl.arange(0, 32)
        inside = channel < D
        key = tl.load(keys + channel[None, :] * stride_d, mask=live[:, None] & inside[None, :], other=0.0)
        key = key.to(tl.float32) - tl.load(mean + h * D + channel, mask=inside, other=0.0)[None, :]
        columns = basis + channel[:, None] * D + axis[None, :]
        turned = tl.load(columns, mask=inside[:, None] & (axis < D)[None, :], other=0.0)
        axes = tl.dot(key, turned, axes, input_precision="tf32x3")
    # Column part * 16 + number of a matrix [32, 128], row part * 4 + axis.
    row = tl.arange(0, 32)
    column = tl.arange(0, 128)
    part = place * 8 + column // 16
    word = words + (h * PARTS + part) * 64 + (column % 16) * 4
    own = (row[:, None] // 4 == (column // 16)[None, :]) & (part < PARTS)[None, :]
    matrix = tl.load(word[None, :] + (row % 4)[:, None], mask=own, other=0.0)
    half_norms = 0.5 * tl.sum(matrix * matrix, 0)
    distances = half_norms[None, :] - tl.dot(axes, matrix, input_precision="tf32x3")
    nearest = tl.argmin(tl.reshape(distances, [BLOCK, 8, 16]), 2)
    shift = tl.arange(0, 8)
    nearest = tl.where((place * 8 + shift < PARTS)[None, :], nearest.to(tl.int32), 0)
    packed = tl.sum(nearest << (4 * shift)[None, :], 1)
    at = token
    if EACH:
        at = tl.load(starts + token, mask=live, other=0) + tl.load(positions + token, mask=live, other=0)
    target = (labels + h * head_stride).to(tl.pointer_type(tl.int32)) + at * ROW_WORDS + place
    tl.store(target, packed, mask=live)
