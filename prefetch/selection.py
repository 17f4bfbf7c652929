"""Which tokens a KV head attends to: the best by label score, in ascending order."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ds_offload.kernels.select import select_tokens
from ds_offload.memory.label_cache import LabelCache
from ds_offload.memory.window import AttentionWindow


@dataclass(frozen=True)
class Step:
    """One decode step of B sequences.

    Attributes:
        lengths: Tokens of each context, the current one included, `[B]` int64 on the device.
        positions: Position of each current token, `lengths - 1`; made with the step, so
            that it stands behind no event another stream waits for.
        past: End of each sequence's candidates, where its recent window begins, `[B]` int64 on the device.
        keep: Candidates each sequence keeps at most, `[B]` int64 on the device.
        most_kept: At least every entry of `keep`: the width of a selection.
        max_length: At least every entry of `lengths`: the width of the scores.
    """

    lengths: Tensor
    positions: Tensor
    past: Tensor
    keep: Tensor
    most_kept: int
    max_length: int

    @classmethod
    def make(cls, lengths: list[int], keep: list[int], window: AttentionWindow, device: torch.device) -> Step:
        """A step just wide enough for contexts of `lengths` tokens that keep `keep` candidates each."""
        positions = [length - 1 for length in lengths]
        past = [length - window.ring for length in lengths]
        on_device = torch.tensor([lengths, positions, past, keep], dtype=torch.int64, device=device)
        return cls(*on_device.unbind(0), max(keep), max(lengths))


class Selector:
    """Picks candidates by label score, one set per KV head.

    The query heads of a KV head share a set: each head's scores become attention
    weights by a softmax over the tokens before the current one, and the weights are
    summed over the heads.
    With one query head per KV head the scores themselves give the same order.

    Args:
        labels: The label cache.
        window: The tokens that need no selection.
        scaling: Factor of the attention scores.
        top_p: Keep the smallest set whose weights reach this share of all candidates'
            and the window's weights; None keeps `Step.keep` tokens.
        everything: Keep every candidate: nothing is scored.

    Attributes:
        everything: As given.
    """

    def __init__(
        self,
        labels: LabelCache,
        window: AttentionWindow,
        scaling: float,
        top_p: float | None = None,
        everything: bool = False,
    ) -> None:
        self.everything = everything
        self._labels = labels
        self._window = window
        self._scaling = scaling
        self._top_p = top_p

    def select(self, layer: int, query: Tensor, step: Step) -> Tensor:
        """Tokens `[B, Hkv, most_kept]` int64 for queries `[B, H, D]`, ascending, -1 behind the last."""
        if step.most_kept == 0:
            return torch.empty(len(query), self._labels.rows.shape[1], 0, dtype=torch.int64, device=query.device)
        if self.everything:
            tokens = self._window.sinks + torch.arange(step.most_kept, device=query.device)
            tokens = torch.where(tokens < step.past[:, None, None], tokens, -1)
            return tokens.expand(-1, self._labels.rows.shape[1], -1).contiguous()
        # Without the current token: its label may be on its way while a prediction is scored.
        weights = self._top_p is not None
        scores = self._labels.scores(layer, query, step.positions, step.max_length, self._scaling, weights=weights)
        keep = step.keep
        if self._top_p is not None:
            group = query.shape[1] // scores.shape[1]
            keep = self._needed(scores, step.past, self._top_p * group).clamp(max=keep[:, None])
        return select_tokens(scores, self._window.sinks, step.past, keep, step.most_kept)

    def predict(self, layer: int, query: Tensor, step: Step) -> Tensor:
        """The same for a predicted query."""
        return self.select(layer, query, step)

    def _needed(self, weights: Tensor, past: Tensor, share: float) -> Tensor:
        """How many of the best candidates `[B, Hkv]` int64 make up `share` together with the window.

        Args:
            weights: `[B, Hkv, T]`, summing to the group's query heads over the tokens.
            past: `[B]`, the end of the candidates.
        """
        token = torch.arange(weights.shape[-1], device=weights.device)
        candidate = (token >= self._window.sinks) & (token < past[:, None, None])
        window = weights.masked_fill(candidate, 0).sum(-1, keepdim=True)
        best = weights.masked_fill(~candidate, 0).sort(-1, descending=True).values
        # A candidate is needed while the window and the better ones fall short.
        return (window + best.cumsum(-1) - best < share).sum(-1)
