"""Which tokens a KV head attends to: the best by label score, in ascending order."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ds_offload.kernels.select import select_tokens
from ds_offload.memory.label_cache import LabelCache
from ds_offload.memory.window import AttentionWindow

# A look-ahead takes this part of the budget more than the selection. On SmolLM2-135M and two texts, 1/16 of 8K
# tokens, a quarter more cuts the rows that must be fetched in line from 2.2 and 5.4 % of the selection to 1.2 and 5.3 %
# (a hot set of 2 x the budget) and from 1.0 and 1.1 % to 0.4 and 0.6 % (4 x); half more gains little.
LOOK_AHEAD_PART = 4


@dataclass(frozen=True)
class Step:
    """One decode step of B sequences.

    Attributes:
        lengths: Tokens of each context, the current one included, `[B]` int64 on the device.
        positions: Position of each current token, `lengths - 1`; made with the step, so
            that it stands behind no event another stream waits for.
        past: End of each sequence's candidates, where its recent window begins, `[B]` int64 on the device.
        keep: Candidates each sequence keeps at most, `[B]` int64 on the device.
        keep_ahead: Candidates that each sequence's look-ahead keeps, `[B]` int64 on the device.
        most_kept: At least every entry of `keep`: the width of a selection.
        max_length: At least every entry of `lengths`: the width of the scores.
    """

    lengths: Tensor
    positions: Tensor
    past: Tensor
    keep: Tensor
    keep_ahead: Tensor
    most_kept: int
    max_length: int

    @classmethod
    def make(cls, lengths: list[int], keep: list[int], window: AttentionWindow, device: torch.device) -> Step:
        """A step just wide enough for contexts of `lengths` tokens that keep `keep` candidates each."""
        values = step_values(lengths, keep, window)
        lengths_, positions, past, keep_, ahead = torch.tensor(values, dtype=torch.int64, device=device)
        return cls(lengths_, positions, past, keep_, ahead, max(keep), max(lengths))

    def of(self, sequence: int) -> Step:
        """The same step of one of the sequences alone, as wide as that of all."""
        one = slice(sequence, sequence + 1)
        return replace(
            self,
            lengths=self.lengths[one],
            positions=self.positions[one],
            past=self.past[one],
            keep=self.keep[one],
            keep_ahead=self.keep_ahead[one],
        )


def step_values(lengths: list[int], keep: list[int], window: AttentionWindow) -> list[list[int]]:
    """The tensors of a step, as lists: lengths, positions, past, keep, keep_ahead."""
    return [
        lengths,
        [length - 1 for length in lengths],
        [length - window.ring for length in lengths],
        keep,
        [count + count // LOOK_AHEAD_PART for count in keep],
    ]


@dataclass(frozen=True)
class Selection:
    """What a query selects.

    Attributes:
        tokens: `[B, Hkv, most_kept]` int64, distinct; ascending, -1 behind the last.
        scores: What orders the candidates, `[B, Hkv, T]` float32 or int16; None where nothing was scored.
        keep: Candidates kept at most, `[B]` or `[B, Hkv]` int64.
    """

    tokens: Tensor
    scores: Tensor | None
    keep: Tensor


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
        top_p: Of each layer: keep the smallest set whose weights by label reach this share of all
            candidates' and the window's weights; None keeps `Step.keep` tokens.
        everything: Keep every candidate: nothing is scored.

    Attributes:
        everything: As given.
    """

    def __init__(
        self,
        labels: LabelCache,
        window: AttentionWindow,
        scaling: float,
        top_p: Sequence[float] | None = None,
        everything: bool = False,
    ) -> None:
        self.everything = everything
        self._labels = labels
        self._window = window
        self._scaling = scaling
        self._top_p = top_p

    def of(self, sequence: int) -> Selector:
        """The same for one of the sequences alone; it selects what it selects among the others."""
        one = copy.copy(self)
        one._labels = self._labels.of(sequence)
        return one

    def select(self, layer: int, query: Tensor, step: Step) -> Selection:
        """The candidates that queries `[B, H, D]` attend to."""
        kv_heads = self._labels.rows.shape[1]
        if step.most_kept == 0:
            none = torch.empty(len(query), kv_heads, 0, dtype=torch.int64, device=query.device)
            return Selection(none, None, step.keep)
        if self.everything:
            tokens = self._window.sinks + torch.arange(step.most_kept, device=query.device)
            tokens = torch.where(tokens < step.past[:, None, None], tokens, -1)
            return Selection(tokens.expand(-1, kv_heads, -1).contiguous(), None, step.keep)
        # Without the current token: its label may be on its way while a prediction is scored.
        weights = self._top_p is not None
        scores = self._labels.scores(
            layer, query, step.positions, step.max_length, self._scaling, weights=weights, order=True
        )
        keep = step.keep
        if self._top_p is not None:
            group = query.shape[1] // scores.shape[1]
            keep = self._needed(scores, step.past, self._top_p[layer] * group).clamp(max=keep[:, None])
        tokens = select_tokens(scores, self._window.sinks, step.past, keep, step.most_kept)
        return Selection(tokens, scores, keep)

    def predict(self, layer: int, query: Tensor, step: Step) -> Tensor:
        """The tokens that a predicted query selects."""
        return self.select(layer, query, step).tokens

    def look_ahead(self, layer: int, selection: Selection, step: Step, width: int) -> Tensor:
        """Tokens `[B, Hkv, width]` int64 likely to be selected next: those selected now and the next best."""
        assert selection.scores is not None, "nothing was scored"
        keep = step.keep_ahead
        if selection.keep is not step.keep:
            keep = selection.keep + selection.keep // LOOK_AHEAD_PART
        return select_tokens(selection.scores, self._window.sinks, step.past, keep, width)

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
