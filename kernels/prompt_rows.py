"""Queries and K/V rows of a prompt's tokens: head norms and RoPE, each to its place, in one launch."""

from __future__ import annotations

from torch import Tensor

from ds_offload.kernels.new_token import HeadNorms, Rope, rotate_heads_reference
from ds_offload.kernels.triton_runtime import jit, launching, power_of_two, tl

# Tokens of a program: a few KiB of one head.
_TOKENS = 16


@jit
def _rotated(source, channel, live, cos, sin, weight, eps, D: tl.constexpr, NORMED: tl.constexpr):
    """Heads of some tokens after their norm and RoPE, float32; `source`, `cos` and `sin` are columns of pointers."""
    HALF: tl.constexpr = D // 2
    lower = channel < HALF
    partner = tl.where(lower, channel + HALF, channel - HALF)
    value = tl.load(source + channel, mask=live, other=0.0).to(tl.float32)
    other = tl.load(source + partner, mask=live, other=0.0).to(tl.float32)
    if NORMED:
        scale = (1.0 / tl.sqrt(tl.sum(value * value, 1) / D + eps))[:, None]
        known = channel < D
        value *= scale * tl.load(weight + channel, mask=known, other=0.0).to(tl.float32)
        other *= scale * tl.load(weight + partner, mask=known, other=0.0).to(tl.float32)
    turned = tl.where(lower, -other, other)
    cosine = tl.load(cos + channel, mask=live, other=0.0).to(tl.float32)
    sine = tl.load(sin + channel, mask=live, other=0.0).to(tl.float32)
    return value * cosine + turned * sine


@jit(do_not_specialize=["tokens", "head_stride"])
def _prompt_rows_kernel(
    query,
    key,
    value,
    cos,
    sin,
    queries,
    rows,
    query_weight,
    key_weight,
    eps,
    tokens,
    head_stride,
    H: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    TOKENS: tl.constexpr,
    NORMED: tl.constexpr,
):
    """One program does one query head, or K and V of one KV head, of TOKENS tokens."""
    unit = tl.program_id(0)
    head = unit % (H + HKV)
    token = ((unit // (H + HKV)).to(tl.int64) * TOKENS + tl.arange(0, TOKENS))[:, None]
    channel = tl.arange(0, D_PAD)[None, :]
    live = (token < tokens) & (channel < D)
    cos += token * D
    sin += token * D
    if head < H:
        at = (token * H + head) * D
        turned = _rotated(query + at, channel, live, cos, sin, query_weight, eps, D, NORMED)
        tl.store(queries + at + channel, turned.to(queries.dtype.element_ty), mask=live)
    else:
        at = (token * HKV + head - H) * D
        row = rows + (head - H).to(tl.int64) * head_stride + token * 2 * D
        turned = _rotated(key + at, channel, live, cos, sin, key_weight, eps, D, NORMED)
        tl.store(row + channel, turned.to(rows.dtype.element_ty), mask=live)
        copied = tl.load(value + at + channel, mask=live, other=0.0)
        tl.store(row + D + channel, copied, mask=live)


def prompt_rows(
    query: Tensor, key: Tensor, value: Tensor, rope: Rope, queries: Tensor, rows: Tensor, norms: HeadNorms | None = None
) -> None:
    """Norm and rotate a prompt's queries and keys, and put them and the values where attention reads them.

    Computed in float32 and rounded once, as `new_token` does. All tensors are on one device and of one dtype,
    float32, float16 or bfloat16.

    Args:
        query: [N, H * D], contiguous, as the linear layer gives it.
        key, value: [N, Hkv * D], contiguous.
        rope: cos and sin, [N, D] each, as transformers makes them (two equal halves), contiguous.
        queries: [N, H, D], contiguous; written.
        rows: K and V [Hkv, N, 2, D], a head's rows side by side; written.
        norms: None where the model has none.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    _check(query, key, value, rope, queries, rows)
    if not query.is_cuda:
        prompt_rows_reference(query, key, value, rope, queries, rows, norms)
        return
    with launching(query.device, "prompt_rows"):
        _launch(query, key, value, rope, queries, rows, norms)


def _launch(
    query: Tensor, key: Tensor, value: Tensor, rope: Rope, queries: Tensor, rows: Tensor, norms: HeadNorms | None
) -> None:
    tokens, heads, dim = queries.shape
    kv_heads = rows.shape[0]
    if not tokens:
        return
    _prompt_rows_kernel[(-(-tokens // _TOKENS) * (heads + kv_heads),)](
        *(query, key, value, *rope, queries, rows),
        *((norms.query, norms.key, norms.eps) if norms is not None else (None, None, 0.0)),
        tokens,
        rows.stride(0),
        H=heads,
        HKV=kv_heads,
        D=dim,
        D_PAD=power_of_two(dim),
        TOKENS=_TOKENS,
        NORMED=norms is not None,
        num_warps=4,
    )


def prompt_rows_reference(
    query: Tensor, key: Tensor, value: Tensor, rope: Rope, queries: Tensor, rows: Tensor, norms: HeadNorms | None = None
) -> None:
    """`prompt_rows` in torch."""
    tokens, _, dim = queries.shape
    heads = [part.view(tokens, -1, dim) for part in (query, key, value)]
    weights = (norms.query, norms.key) if norms is not None else (None, None)
    eps = norms.eps if norms is not None else 0.0
    queries.copy_(rotate_heads_reference(heads[0], rope, weights[0], eps))
    rows[:, :, 0] = rotate_heads_reference(heads[1], rope, weights[1], eps).transpose(0, 1)
    rows[:, :, 1] = heads[2].transpose(0, 1)


def _check(query: Tensor, key: Tensor, value: Tensor, rope: Rope, queries: Tensor, rows: Tensor) -> None:
    if queries.dim() != 3 or not queries.is_contiguous() or queries.shape[2] % 2:
        raise ValueError(f"queries {tuple(queries.shape)} must be [N, H, D] of an even D, contiguous")
    tokens, heads, dim = queries.shape
    if rows.dim() != 4 or rows.shape[1:] != (tokens, 2, dim) or rows.stride()[1:] != (2 * dim, dim, 1):
        raise ValueError(f"rows {tuple(rows.shape)} must be [Hkv, {tokens}, 2, {dim}], a head's rows side by side")
    for name, tensor, shape in (
        ("query", query, (tokens, heads * dim)),
        ("key", key, (tokens, rows.shape[0] * dim)),
        ("value", value, (tokens, rows.shape[0] * dim)),
        ("cos", rope[0], (tokens, dim)),
        ("sin", rope[1], (tokens, dim)),
    ):
        if tensor.shape != shape or not tensor.is_contiguous():
            raise ValueError(f"{name} {tuple(tensor.shape)} must be {shape}, contiguous")
    given = (query, key, value, *rope, queries, rows)
    if len({(tensor.dtype, tensor.device) for tensor in given}) > 1:
        raise ValueError("query, key, value, rope, queries and rows must be of one dtype and on one device")
