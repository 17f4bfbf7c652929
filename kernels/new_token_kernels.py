"""The Triton kernels of `new_token` (kernels/new_token.py)."""

from __future__ import annotations

from ds_offload.kernels.dependent_launch import follow, step_kernel
from ds_offload.kernels.triton_runtime import jit, tl


@jit
def inverse_rms(head, eps, D: tl.constexpr, D_PAD: tl.constexpr):
    """One over the root mean square of a head's channels."""
    channel = tl.arange(0, D_PAD)
    value = tl.load(head + channel, mask=channel < D, other=0.0).to(tl.float32)
    return 1.0 / tl.sqrt(tl.sum(value * value, 0) / D + eps)


@jit
def rotated(head, channel, live, cos, sin, weight, scale, D: tl.constexpr, NORMED: tl.constexpr):
    """Channels of a head after its norm and RoPE, float32, rounded to the head's dtype.

    Any channels in any order: each is made from itself and its partner half a head away.
    """
    HALF: tl.constexpr = D // 2
    lower = channel < HALF
    partner = tl.where(lower, channel + HALF, channel - HALF)
    value = tl.load(head + channel, mask=live, other=0.0).to(tl.float32)
    other = tl.load(head + partner, mask=live, other=0.0).to(tl.float32)
    if NORMED:
        value *= scale * tl.load(weight + channel, mask=live, other=0.0).to(tl.float32)
        other *= scale * tl.load(weight + partner, mask=live, other=0.0).to(tl.float32)
    turned = tl.where(lower, -other, other)
    cosine = tl.load(cos + channel, mask=live, other=0.0).to(tl.float32)
    sine = tl.load(sin + channel, mask=live, other=0.0).to(tl.float32)
    return (value * cosine + turned * sine).to(head.dtype.element_ty).to(tl.float32)


@step_kernel
def rotate_kernel(heads, cos, sin, out, weight, eps, count, D: tl.constexpr, D_PAD: tl.constexpr, NORMED: tl.constexpr):
    """One program rotates one head of one sequence."""
    follow()
    head = tl.program_id(0).to(tl.int64)
    b = head // count
    channel = tl.arange(0, D_PAD)
    live = channel < D
    scale = 1.0
    if NORMED:
        scale = inverse_rms(heads + head * D, eps, D, D_PAD)
    value = rotated(heads + head * D, channel, live, cos + b * D, sin + b * D, weight, scale, D, NORMED)
    tl.store(out + head * D + channel, value.to(out.dtype.element_ty), mask=live)


@step_kernel(do_not_specialize=["stride_b", "stride_h", "stride_slot", "sinks", "ring", "head_stride"])
def new_token_kernel(
    projected,
    cos,
    sin,
    positions,
    query,
    kv_rows,
    query_weight,
    key_weight,
    eps,
    window,
    stride_b,
    stride_h,
    stride_slot,
    sinks,
    ring,
    labels,
    head_stride,
    channels,
    mean,
    starts,
    kv_heads,
    G: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    NORMED: tl.constexpr,
    WINDOW: tl.constexpr,
    LABELS: tl.constexpr,
    R: tl.constexpr,
    BITS: tl.constexpr,
    PER: tl.constexpr,
    ELEMENTS: tl.constexpr,
    ELEMENTS_PAD: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    SHARE: tl.constexpr,
    FLOAT16_MAX: tl.constexpr,
):
    """One program does everything for one KV head of one sequence and its G query heads."""
    follow()
    pair = tl.program_id(0).to(tl.int64)
    b = pair // kv_heads
    h = pair % kv_heads
    heads = kv_heads * G
    projected += b * (heads + 2 * kv_heads) * D
    cos += b * D
    sin += b * D
    position = tl.load(positions + b)
    channel = tl.arange(0, D_PAD)
    live = channel < D
    key_head = projected + (heads + h) * D
    scale = 1.0
    if NORMED:
        scale = inverse_rms(key_head, eps, D, D_PAD)

    kind = kv_rows.dtype.element_ty
    key = rotated(key_head, channel, live, cos, sin, key_weight, scale, D, NORMED).to(kind)
    value = tl.load(projected + (heads + kv_heads + h) * D + channel, mask=live, other=0.0).to(tl.float32).to(kind)
    tl.store(kv_rows + pair * 2 * D + channel, key, mask=live)
    tl.store(kv_rows + (pair * 2 + 1) * D + channel, value, mask=live)
    if WINDOW:
        slot = tl.where(position < sinks, position, sinks + position % ring)
        row = window + b * stride_b + h * stride_h + slot * stride_slot
        tl.store(row + channel, key, mask=live)
        tl.store(row + D + channel, value, mask=live)

    if LABELS:
        # Channel `place * PER + slot` has its code at bits `slot * BITS` of byte `place`.
        place = tl.arange(0, ELEMENTS_PAD)
        slot_in_byte = tl.arange(0, PER)
        kept = place[:, None] * PER + slot_in_byte[None, :]
        known = (kept < R) & (place < ELEMENTS)[:, None]
        at = tl.load(channels + h * R + kept, mask=known, other=0)
        centred = rotated(key_head, at, known, cos, sin, key_weight, scale, D, NORMED)
        centred -= tl.load(mean + h * R + kept, mask=known, other=0.0)
        label = labels + h * head_stride + (tl.load(starts + b) + position) * ROW_BYTES
        if BITS == 16:
            halves = label.to(tl.pointer_type(tl.float16))
            clamped = tl.minimum(tl.maximum(centred, -FLOAT16_MAX), FLOAT16_MAX)
            tl.store(halves + kept, clamped.to(tl.float16), mask=known)
        else:
            N: tl.constexpr = 2**BITS - 1
            largest = tl.max(tl.max(tl.where(known, tl.abs(centred), 0.0), 1), 0)
            step = tl.floor(tl.log2(largest * SHARE) * 12.0 + 128.5)
            step = tl.minimum(tl.maximum(step, 0.0), 255.0)
            inverse = tl.exp2((step - 128.0) * (-1.0 / 12.0)) * (N / 2)
            code = tl.floor(centred * inverse + (N / 2 + 0.5))
            code = tl.minimum(tl.maximum(code, 0.0), N).to(tl.int32)
            code = tl.where(known, code << (slot_in_byte * BITS)[None, :], 0)
            tl.store(label + place, tl.sum(code, 1).to(tl.uint8), mask=place < ELEMENTS)
            tl.store(label + (ROW_BYTES - 1), step.to(tl.int32).to(tl.uint8))

    for g in range(G):
        head = h * G + g
        source = projected + head * D
        scale = 1.0
        if NORMED:
            scale = inverse_rms(source, eps, D, D_PAD)
        turned = rotated(source, channel, live, cos, sin, query_weight, scale, D, NORMED)
        tl.store(query + (b * heads + head) * D + channel, turned.to(query.dtype.element_ty), mask=live)
