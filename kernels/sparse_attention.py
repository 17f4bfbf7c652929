"""Attention of one query per sequence over the rows that were kept."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sparse_attention(query: Tensor, rows: Tensor, valid: Tensor, scaling: float) -> Tensor:
    """Exact softmax attention over the kept rows.

    Args:
        query: `[B, H, D]`.
        rows: `[B, Hkv, P, 2, D]`, K and V side by side; every element finite.
        valid: `[B, Hkv, P]` bool; at least one row of each head is valid.
        scaling: Factor of the scores.

    Returns:
        `[B, H, D]` in the query's dtype.
    """
    sequences, heads, head_dim = query.shape
    if sequences > 1 and not query.is_cuda:
        # The CPU's SDPA sums in another order for another batch: one sequence at a time gives it the same bits alone.
        alone = zip(query.split(1), rows.split(1), valid.split(1), strict=True)
        return torch.cat([sparse_attention(*one, scaling) for one in alone])
    kv_heads = rows.shape[1]
    rows = rows.to(query.dtype)
    # The query heads of a KV head stand where SDPA has its query tokens: K/V are not repeated.
    grouped = query.view(sequences, kv_heads, heads // kv_heads, head_dim)
    out = F.scaled_dot_product_attention(
        grouped, rows[..., 0, :], rows[..., 1, :], attn_mask=valid[:, :, None], scale=scaling
    )
    return out.reshape(sequences, heads, head_dim)


def sparse_attention_reference(query: Tensor, rows: Tensor, valid: Tensor, scaling: float) -> Tensor:
    """The same in float32, written out."""
    sequences, heads, head_dim = query.shape
    kv_heads = rows.shape[1]
    grouped = query.float().view(sequences, kv_heads, heads // kv_heads, head_dim)
    keys, values = rows.float().unbind(-2)
    scores = scaling * torch.einsum("bhgd,bhpd->bhgp", grouped, keys)
    weights = scores.masked_fill(~valid[:, :, None], -torch.inf).softmax(-1)
    return torch.einsum("bhgp,bhpd->bhgd", weights, values).reshape(sequences, heads, head_dim).to(query.dtype)
