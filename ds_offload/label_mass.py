"""How much attention label scores find: what a top-p budget asks of them so that it gets what it says."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_offload.config import OffloadConfig
from ds_offload.kernels.product_code import ProductCode, decode_product, encode_product
from ds_offload.memory.window import AttentionWindow

# Shares of the attention as the labels see it, for which calibration measures what the chosen tokens really have.
SHARES = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.925, 0.95, 0.97, 0.98, 0.99, 0.995, 0.999)
# The least context that says anything, and how many of its tokens ask.
LEAST_TOKENS = 512
QUERIES = 64
_WINDOW = AttentionWindow(OffloadConfig.sink_tokens, OffloadConfig.recent_tokens)


def asking(tokens: int) -> Tensor:
    """The positions `[n]` int64 of a context of `tokens` tokens whose queries are compared: of its second half."""
    return torch.linspace(tokens // 2, tokens - 1, min(QUERIES, tokens)).long().unique()


def label_mass(query: Tensor, key: Tensor, code: ProductCode, scaling: float) -> Tensor:
    """The exact attention of tokens that labels choose, by the share that they promise.

    For every share the fewest tokens are taken whose weights by label, together with the window's, reach it, as
    `Selector` takes them. Queries whose window promises the share alone do not count: they take nothing.

    Args:
        query: `[n, H, D]` at the positions `asking(N)` of one context.
        key: `[N, Hkv, D]`, all of the context.
        code: Of the layer, on the keys' device.
        scaling: Factor of the attention scores.

    Returns:
        `[len(SHARES)]` float32: means over queries and KV heads; the share itself where no query counts.
    """
    tokens, kv_heads, _ = key.shape
    positions = asking(tokens).to(key.device)
    rows = torch.empty(kv_heads, tokens, code.layout.row_bytes, dtype=torch.uint8, device=key.device)
    keys = key.transpose(0, 1).contiguous()
    encode_product(keys, code, rows)
    seen = torch.arange(tokens, device=key.device)
    future = seen >= positions[:, None]
    forced = (seen < _WINDOW.sinks) | (seen >= positions[:, None] - _WINDOW.recent)
    labels = decode_product(rows, code)
    total, count = torch.zeros(2, len(SHARES), dtype=torch.float64, device=key.device)
    of_group = query.float().unflatten(1, (kv_heads, -1)).transpose(0, 1)
    for head, queries in enumerate(of_group):
        by_label, exact = (
            (queries @ each[head].float().T * scaling).masked_fill(future[:, None], -torch.inf).softmax(-1).mean(1)
            for each in (labels, keys)
        )
        candidates = by_label.masked_fill(forced, 0)
        order = candidates.argsort(-1, descending=True)
        best = candidates.gather(1, order)
        before = by_label.masked_fill(~forced, 0).sum(-1, keepdim=True) + best.cumsum(-1) - best
        found = exact.masked_fill(forced, 0).gather(1, order)
        window = exact.masked_fill(~forced, 0).sum(-1)
        for number, share in enumerate(SHARES):
            counts = before[:, 0] < share
            mass = window + torch.where(before < share, found, 0).sum(-1)
            total[number] += (mass * counts).sum()
            count[number] += counts.sum()
    return torch.where(count > 0, total / count, total.new_tensor(SHARES)).float().cpu()


def shares_for(mass: Tensor | None, top_p: float, layers: int) -> list[float]:
    """What to ask of each layer's labels, so that the chosen tokens have `top_p` of the exact attention.

    Args:
        mass: `label_mass` of every layer, `[L, len(SHARES)]`; None asks for `top_p` itself.
        top_p: Over 0 and up to 1.

    Returns:
        A share of each layer, linear between those that were measured. What labels never
        found is asked for as the most that was measured, or `top_p` if that is more.
    """
    if mass is None:
        return [top_p] * layers
    wanted = []
    for found in mass.double().cummax(-1).values.tolist():
        points = [(0.0, 0.0), *zip(SHARES, found, strict=True)]
        above = next((number for number, (_, reached) in enumerate(points) if reached >= top_p), None)
        if above is None:
            wanted.append(max(top_p, SHARES[-1]))
            continue
        (low, least), (high, most) = points[above - 1], points[above]
        wanted.append(low + (high - low) * (top_p - least) / (most - least))
    return wanted
