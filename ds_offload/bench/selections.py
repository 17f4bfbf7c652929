"""Selections that repeat from step to step as much as those of real text: for benchmarks of random weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ds_offload.kernels.select import select_tokens
from ds_offload.prefetch.selection import Step

# Of the random process in `ReplayedSelections`; a token's lasting popularity has a standard deviation of 1.
DRIFT = 0.73
DRIFT_KEPT = 0.88
FLICKER = 0.28
PREDICTION_ERROR = 0.43


@dataclass(frozen=True)
class ReplayedSelections:
    """Selected and predicted tokens of a number of steps, drawn at random.

    Each token of each head has a score: a lasting popularity (exponential), a drift
    (an AR(1) process that keeps `DRIFT_KEPT` of itself from step to step, times `DRIFT`) and a
    flicker that is new at every step (times `FLICKER`). A step selects the tokens of the highest scores; the
    prediction adds an error to each score (times `PREDICTION_ERROR`) and selects likewise.

    The four constants are fitted to what SmolLM2-135M selects at 1/16 of 8K tokens of
    text: 79 to 80 % of a selection was selected one step before; a set that
    loses its least recently selected tokens hits 85 to 87 % at 1.25 times the
    selection, 94 % at 2 times and 98 % at 4 times; a prediction from the layer before
    recalls 83 %. At another budget the process repeats itself more or less than this.

    Attributes:
        tokens: Selected tokens `[S, B, Hkv, K]` int64, ascending.
        predicted: Predicted ones, the same shape.
    """

    tokens: Tensor
    predicted: Tensor

    @classmethod
    def draw(
        cls,
        steps: int,
        shape: tuple[int, int],
        kept: int,
        candidates: tuple[int, int],
        device: torch.device,
        seed: int = 0,
    ) -> ReplayedSelections:
        """Draw the selections of `steps` steps.

        Args:
            steps: S.
            shape: B and Hkv; every sequence and head has a process of its own.
            kept: K, at most the number of candidates.
            candidates: The first candidate, and the end of the candidates.
            device: Where the selections are made and stay.

        Raises:
            ValueError: Fewer candidates than are kept.
        """
        first, last = candidates
        count = last - first
        if count < kept:
            raise ValueError(f"{count} candidates from {first} to {last} are fewer than the {kept} that are kept")
        generator = torch.Generator(device).manual_seed(seed)
        popularity = torch.empty(*shape, count, device=device).exponential_(generator=generator)
        drift = torch.empty_like(popularity).normal_(generator=generator)
        noise = torch.empty_like(popularity)
        tokens = torch.empty(steps, *shape, kept, dtype=torch.int64, device=device)
        predicted = torch.empty_like(tokens)
        ends = torch.full(shape[:1], count, dtype=torch.int64, device=device)
        keep = torch.full(shape[:1], kept, dtype=torch.int64, device=device)
        for step in range(steps):
            drift.mul_(DRIFT_KEPT).add_(noise.normal_(generator=generator), alpha=(1 - DRIFT_KEPT**2) ** 0.5)
            scores = torch.add(popularity, drift, alpha=DRIFT)
            scores.add_(noise.normal_(generator=generator), alpha=FLICKER)
            select_tokens(scores, 0, ends, keep, kept, tokens[step])
            scores.add_(noise.normal_(generator=generator), alpha=PREDICTION_ERROR)
            select_tokens(scores, 0, ends, keep, kept, predicted[step])
        return cls(tokens.add_(first), predicted.add_(first))

    def shuffled(self) -> ReplayedSelections:
        """The same selections, each in one random order."""
        order = torch.randperm(self.tokens.shape[-1], generator=torch.Generator().manual_seed(0))
        order = order.to(self.tokens.device)
        return ReplayedSelections(self.tokens[..., order], self.predicted[..., order])

    @staticmethod
    def nbytes(steps: int, shape: tuple[int, int], kept: int) -> int:
        """Bytes that `draw` of these sizes keeps."""
        return 2 * steps * shape[0] * shape[1] * kept * 8


class ReplaySelector:
    """Selects as `inner` does, so that this takes its time, and gives replayed tokens instead of the result.

    Which step it is follows from the step's first position, on the device: a captured
    graph replays the right one, and no stream changes what another reads. After the
    last step the first comes again. All layers get the same tokens.

    Args:
        inner: The selector whose work is done: a `Selector`, or one with its methods.
        selections: What is given.
        first_position: Position of the first sequence's current token at the first step.

    Attributes:
        everything: Never: there is something to select.
    """

    everything = False

    def __init__(self, inner: Any, selections: ReplayedSelections, first_position: int) -> None:
        self._inner = inner
        self._selections = selections
        self._first_position = first_position

    def select(self, layer: int, query: Tensor, step: Step) -> Tensor:
        """The step's selected tokens `[B, Hkv, most_kept]` int64."""
        self._inner.select(layer, query, step)
        return self._now(self._selections.tokens, step)

    def predict(self, layer: int, query: Tensor, step: Step) -> Tensor:
        """The step's predicted tokens `[B, Hkv, most_kept]` int64."""
        self._inner.predict(layer, query, step)
        return self._now(self._selections.predicted, step)

    def _now(self, tokens: Tensor, step: Step) -> Tensor:
        number = (step.positions[:1] - self._first_position) % len(tokens)
        # A step on a CPU is only as wide as its own length needs.
        return tokens.index_select(0, number)[0, ..., : step.most_kept]
