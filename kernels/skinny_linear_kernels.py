"""The Triton kernels of skinny linear layers: weights read once for up to 16 rows of x.

A program computes BLOCK_M outputs of one weight for every column; a column is a row of
x. With GATED it reads the same rows of two weights, w0 and w1 (M0 rows each; M1 and M2
are 0). RMSNorm is folded in: the products of x * gain and the sum of x squared grow side
by side, and the sum's root divides at the end. Sizes are known when a kernel is compiled: so are alignments, and
masks that would hide nothing are left out.
"""

from __future__ import annotations

from ds_offload.kernels.dependent_launch import follow, step_kernel
from ds_offload.kernels.triton_runtime import jit, tl


@jit
def place(block, w0, w1, w2, M0: tl.constexpr, M1: tl.constexpr, M2: tl.constexpr, BLOCK_M: tl.constexpr):
    """The weight that `block` falls into: its address, its size, the rows of the block, the weight's first output."""
    second = (M0 + BLOCK_M - 1) // BLOCK_M
    third = second + (M1 + BLOCK_M - 1) // BLOCK_M
    weight = w0
    size = 0 * block + M0
    before = 0 * block
    start = 0 * block
    if M1 > 0:
        behind = block >= second
        weight = tl.where(behind, w1, weight)
        size = tl.where(behind, M1, size)
        before = tl.where(behind, M0, before)
        start = tl.where(behind, second, start)
    if M2 > 0:
        behind = block >= third
        weight = tl.where(behind, w2, weight)
        size = tl.where(behind, M2, size)
        before = tl.where(behind, M0 + M1, before)
        start = tl.where(behind, third, start)
    row = (block - start) * BLOCK_M + tl.arange(0, BLOCK_M)
    return weight, size, row, before


@jit
def weight_tile(pointers, k, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """A tile of weights, which nothing reads again soon: 0 beyond K."""
    if K % BLOCK_K == 0:
        loaded = tl.load(pointers, eviction_policy="evict_first")
    else:
        loaded = tl.load(pointers, mask=k < K, other=0.0, eviction_policy="evict_first")
    return loaded


@jit
def squares_tile(x, k, column, n, K: tl.constexpr, BLOCK_K: tl.constexpr, COLUMNS: tl.constexpr, RUN: tl.constexpr):
    """Squares of x at channels `k` [BLOCK_K] of all columns, RUN neighbours added up: [COLUMNS, BLOCK_K / RUN].

    Reads what the product reads too: a tile of x that is only multiplied goes to the tensor
    cores by way of swizzled shared memory, one that is also summed would meet bank conflicts.
    """
    known = (column < n)[:, None] & (k < K)[None, :]
    wide = tl.load(x + column.to(tl.int64)[:, None] * K + k[None, :], mask=known, other=0.0).to(tl.float32)
    return tl.sum(tl.reshape(wide * wide, [COLUMNS, BLOCK_K // RUN, RUN]), 2)


@jit
def silu(value):
    """x * sigmoid(x) of float32."""
    return value / (1.0 + tl.exp(-value))


@jit
def finish(
    value, live, output, column, n, b0, b1, b2, residual, out, M0: tl.constexpr, M1: tl.constexpr, M2: tl.constexpr
):
    """Adds bias and residual to `value` [BLOCK_M, columns] and stores it at `output` [BLOCK_M], where live."""
    if b0 is not None:
        mask = live & (output < M0)
        value += tl.load(b0 + output, mask=mask, other=0.0).to(tl.float32)[:, None]
    if b1 is not None:
        mask = live & (output >= M0) & (output < M0 + M1)
        value += tl.load(b1 + (output - M0), mask=mask, other=0.0).to(tl.float32)[:, None]
    if b2 is not None:
        mask = live & (output >= M0 + M1)
        value += tl.load(b2 + (output - M0 - M1), mask=mask, other=0.0).to(tl.float32)[:, None]
    offset = column.to(tl.int64)[None, :] * (M0 + M1 + M2) + output[:, None]
    written = live[:, None] & (column < n)[None, :]
    if residual is not None:
        value += tl.load(residual + offset, mask=written, other=0.0).to(tl.float32)
    tl.store(out + offset, value.to(out.dtype.element_ty), mask=written)


@step_kernel(do_not_specialize=["n", "eps"])
def linear_tensor_core_kernel(
    x,
    w0,
    w1,
    w2,
    b0,
    b1,
    b2,
    gain,
    residual,
    out,
    n,
    eps,
    M0: tl.constexpr,
    M1: tl.constexpr,
    M2: tl.constexpr,
    K: tl.constexpr,
    GATED: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """BLOCK_M rows of weights times all columns; each of SPLITS warps multiplies its own part of every BLOCK_K."""
    follow()
    PART: tl.constexpr = BLOCK_K // SPLITS
    # Squares of so many neighbours, which one thread has read, are added up at once.
    RUN: tl.constexpr = 8
    # x * gain may be beyond float16's range, normalised it is not: then the squares are read first.
    AHEAD: tl.constexpr = gain is not None and x.dtype.element_ty == tl.float16
    block = tl.program_id(0)
    weight, size, row, before = place(block, w0, w1, w2, M0, M1, M2, BLOCK_M)
    column = tl.arange(0, COLUMNS)
    # Rows beyond the end read the last one again, which needs no mask, and are not stored.
    address = tl.minimum(row, size - 1).to(tl.int64)[None, :, None] * K
    inner = tl.arange(0, SPLITS)[:, None] * PART + tl.arange(0, PART)[None, :]
    acc = tl.zeros([SPLITS, BLOCK_M, COLUMNS], tl.float32)
    up = tl.zeros([SPLITS, BLOCK_M, COLUMNS], tl.float32)
    flat = tl.arange(0, BLOCK_K)
    squares = tl.zeros([COLUMNS, BLOCK_K // RUN], tl.float32)
    root = tl.full([COLUMNS], 1.0, tl.float32)
    if AHEAD:
        for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
            squares += squares_tile(x, start + flat, column, n, K, BLOCK_K, COLUMNS, RUN)
        root = tl.rsqrt(tl.sum(squares, 1) / K + eps)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        k = start + inner
        w = weight_tile(weight + address + k[:, None, :], k[:, None, :], K, BLOCK_K)
        known = (column < n)[None, None, :] & (k < K)[:, :, None]
        xt = tl.load(x + column.to(tl.int64)[None, None, :] * K + k[:, :, None], mask=known, other=0.0)
        if gain is not None:
            if not AHEAD:
                squares += squares_tile(x, start + flat, column, n, K, BLOCK_K, COLUMNS, RUN)
            scale = tl.load(gain + k, mask=k < K, other=0.0).to(tl.float32)
            xt = (xt.to(tl.float32) * root[None, None, :] * scale[:, :, None]).to(w.dtype)
        acc = tl.dot(w, xt, acc)
        if GATED:
            w = weight_tile(w1 + address + k[:, None, :], k[:, None, :], K, BLOCK_K)
            up = tl.dot(w, xt, up)
    value = tl.sum(acc, 0)
    linear = tl.sum(up, 0)
    if gain is not None and not AHEAD:
        root = tl.rsqrt(tl.sum(squares, 1) / K + eps)
        value *= root[None, :]
        linear *= root[None, :]
    if GATED:
        value = silu(value) * linear
    finish(value, row < size, before + row, column, n, b0, b1, b2, residual, out, M0, M1, M2)


@step_kernel(do_not_specialize=["n", "eps"])
def linear_vector_kernel(
    x,
    w0,
    w1,
    w2,
    b0,
    b1,
    b2,
    gain,
    residual,
    out,
    n,
    eps,
    M0: tl.constexpr,
    M1: tl.constexpr,
    M2: tl.constexpr,
    K: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """BLOCK_M rows of weights times one column, without tensor cores.

    Programs of the same rows are neighbours, so all columns but the first find the
    weights in L2. Each place of a tile keeps its own sum: warps exchange nothing before
    the end.
    """
    follow()
    block = tl.program_id(0) // n
    column = tl.program_id(0) % n + tl.arange(0, 1)
    weight, size, row, before = place(block, w0, w1, w2, M0, M1, M2, BLOCK_M)
    address = tl.minimum(row, size - 1).to(tl.int64)[:, None] * K
    x += (tl.program_id(0) % n).to(tl.int64) * K
    inner = tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    squares = tl.zeros([BLOCK_K], tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        k = start + inner
        w = weight_tile(weight + address + k[None, :], k[None, :], K, BLOCK_K).to(tl.float32)
        value = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
        if gain is not None:
            squares += value * value
            value *= tl.load(gain + k, mask=k < K, other=0.0).to(tl.float32)
        acc += w * value[None, :]
        if GATED:
            w = weight_tile(w1 + address + k[None, :], k[None, :], K, BLOCK_K).to(tl.float32)
            up += w * value[None, :]
    value = tl.sum(acc, 1)[:, None]
    linear = tl.sum(up, 1)[:, None]
    if gain is not None:
        root = tl.rsqrt(tl.sum(squares, 0) / K + eps)
        value *= root
        linear *= root
    if GATED:
        value = silu(value) * linear
    finish(value, row < size, before + row, column, n, b0, b1, b2, residual, out, M0, M1, M2)
