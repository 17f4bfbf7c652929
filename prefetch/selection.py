"""Which tokens a KV head attends to: the best by label score, in ascending order."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from ds_offload.memory.label_cache import LabelCache
from ds_offload.memory.window import AttentionWindow
from torch import Tensor


@dataclass(frozen=True)
class Step:
    """One decode step of B sequences.

    Attributes:
        lengths: Tokens of each context, the current one included, `[B]` int64 on the device.
        positions: Position of each current token, `lengths - 1`; made with the step, so
            that it stands behind no event another stream waits for.
        keep: Candidates each sequence keeps at most, `[B]` int64 on the device.
        most_kept: At least every entry of `keep`: the width of a selection.
        max_length: At least every entry of `lengths`: the width of the scores.
    """

    lengths: Tensor
    positions: Tensor
    keep: Tensor
    most_kept: int
    max_length: int

    @classmethod
    def make(cls, lengths: list[int], keep: list[int], device: torch.device) -> Step:
        """A step just wide enough for contexts of `lengths` tokens that keep `keep` candidates each."""
        on_device = torch.tensor([lengths, [n - 1 for n in lengths], keep], dtype=torch.int64, device=device)
        return cls(on_device[0], on_device[1], on_device[2], max(keep), max(lengths))


def top_tokens(scores: Tensor, count: int) -> Tensor:
    """Indices `[..., count]` int64 of the highest `scores` `[..., T]` float32, the best first.

    Equal scores are taken lowest index first (labels of few bits tie often), so the
    result is the same on every device, and that of a smaller count is its beginning.
    """
    bits = scores.view(torch.int32)
    # As integers, floats order like this: negative ones by their flipped magnitude.
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(torch.int64)
    index = torch.arange(scores.shape[-1], device=scores.device)
    keys = (ordered << 32) | (0x7FFFFFFF - index)
    return keys.topk(count, -1).indices


class Selector:
    """Picks candidates by label score, one set per KV head.

    The query heads of a KV head share a set: each head's scores become attention
    weights by a softmax over the tokens, and the weights are summed over the heads.
    With one query head per KV head the scores themselves give the same order.

    Args:
        labels: The label cache.
        window: The tokens that need no selection.
        scaling: Factor of the attention scores.
        top_p: Keep the smallest set whose weights reach this share of all candidates'
            and the window's weights; None keeps `Step.keep` tokens.
    """

    def __init__(self, labels: LabelCache, window: AttentionWindow, scaling: float, top_p: float | None = None) -> None:
        self._labels = labels
        self._window = window
        self._scaling = scaling
        self._top_p = top_p

    def select(self, layer: int, query: Tensor, step: Step) -> Tensor:
        """Tokens `[B, Hkv, most_kept]` int64 for queries `[B, H, D]`, ascending, -1 behind the last."""
        if step.most_kept == 0:
            return torch.empty(len(query), self._labels.rows.shape[1], 0, dtype=torch.int64, device=query.device)
        scores = self._labels.scores(layer, query, step.lengths, step.max_length, self._scaling)
        sequences, heads, length = scores.shape
        kv_heads = self._labels.rows.shape[1]
        if heads != kv_heads or self._top_p is not None:
            scores = scores.softmax(-1).view(sequences, kv_heads, heads // kv_heads, length).sum(2)
        token = torch.arange(length, device=scores.device)
        past = (step.lengths - self._window.ring)[:, None, None]
        outside = (token < self._window.sinks) | (token >= past)
        forced = scores.masked_fill(~outside, 0).sum(-1, keepdim=True) if self._top_p is not None else None
        candidates = scores.masked_fill(outside, -torch.inf)
        tokens = top_tokens(candidates, step.most_kept)
        best = candidates.gather(-1, tokens)
        rank = torch.arange(step.most_kept, device=scores.device)
        dropped = (rank >= step.keep[:, None, None]) | (best == -torch.inf)
        if self._top_p is not None and forced is not None:
            # Token r is needed while the window and the tokens before it fall short.
            before = best.clamp(min=0).cumsum(-1) - best.clamp(min=0) + forced
            dropped |= before >= self._top_p * (heads // kv_heads)
        tokens = tokens.masked_fill(dropped, length).sort(-1).values
        return tokens.masked_fill(tokens == length, -1)
