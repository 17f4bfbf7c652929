"""Selections that repeat from step to step as much as those of real text: for benchmarks of random weights."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ds_offload.kernels.select import select_tokens
from ds_offload.prefetch.selection import LOOK_AHEAD_PART, Selection, Step

# Of the random process in `ReplayedSelections`; a token's lasting popularity has a standard deviation of 1.
POPULARITY_POWER = 0.731
DRIFT = 0.591
DRIFT_KEPT = 0.843
FLICKER = 0.202
PREDICTION_ERROR = 0.365


@dataclass(frozen=True)
class ReplayedSelections:
    """Selected and predicted tokens of a number of steps, drawn at random.

    Each token of each head has a score: a lasting popularity (exponential, to the power
    `POPULARITY_POWER`), a drift (an AR(1) process that keeps `DRIFT_KEPT` of itself from step
    to step, times `DRIFT`) and a flicker that is new at every step (times `FLICKER`). A step
    selects the tokens of the highest scores, and the look-ahead the next best as well; the
    prediction adds an error to each score (times `PREDICTION_ERROR`) and selects likewise.

    The constants are fitted to what SmolLM2-135M selects at 1/16 of 8K tokens of text:
    79 to 80 % of a selection was selected one step before; a set that loses its least
    recently selected tokens hits 86 % at 1.25 times the selection, 94 % at 2 times and 98 %
    at 4 times; a prediction from the layer
    before recalls 83 %. A look-ahead leaves three quarters of the misses here, where two
    texts left 54 and 98 % of them at 2 times the selection and 37 and 50 % at 4 times: the
    process is no kinder to it. At another budget it repeats itself more or less than this.

    Attributes:
        tokens: Selected tokens `[S, B, Hkv, K]` int64, ascending.
        predicted: Predicted ones, the same shape.
        ahead: Those that look ahead to the next step, `[S, B, Hkv, K + K // 4]` (`LOOK_AHEAD_PART`).
    """

    tokens: Tensor
    predicted: Tensor
    ahead: Tensor

    @classmethod
    def draw(
        cls,
        steps: int,
        shape: tuple[int, int],
        kept: int,
        candidates: tuple[int, int],
        device: torch.device,
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
        generator = torch.Generator(device).manual_seed(0)
        popularity = torch.empty(*shape, count, device=device).exponential_(generator=generator)
        power = POPULARITY_POWER
        popularity.pow_(power).div_(math.sqrt(math.gamma(1 + 2 * power) - math.gamma(1 + power) ** 2))
        drift = torch.empty_like(popularity).normal_(generator=generator)
        noise = torch.empty_like(popularity)
        tokens = torch.empty(steps, *shape, kept, dtype=torch.int64, device=device)
        predicted = torch.empty_like(tokens)
        more = min(count, kept + kept // LOOK_AHEAD_PART)
        ahead = torch.empty(steps, *shape, more, dtype=torch.int64, device=device)
        ends = torch.full(shape[:1], count, dtype=torch.int64, device=device)
        keep = torch.full(shape[:1], kept, dtype=torch.int64, device=device)
        for step in range(steps):
            drift.mul_(DRIFT_KEPT).add_(noise.normal_(generator=generator), alpha=(1 - DRIFT_KEPT**2) ** 0.5)
            scores = torch.add(popularity, drift, alpha=DRIFT)
            scores.add_(noise.normal_(generator=generator), alpha=FLICKER)
            select_tokens(scores, 0, ends, keep, kept, tokens[step])
            select_tokens(scores, 0, ends, torch.full_like(keep, more), more, ahead[step])
            scores.add_(noise.normal_(generator=generator), alpha=PREDICTION_ERROR)
            select_tokens(scores, 0, ends, keep, kept, predicted[step])
        return cls(tokens.add_(first), predicted.add_(first), ahead.add_(first))

    def shuffled(self) -> ReplayedSelections:
        """The same selections, each in one random order."""
        order = torch.randperm(self.tokens.shape[-1], generator=torch.Generator().manual_seed(0))
        order = order.to(self.tokens.device)
        return ReplayedSelections(self.tokens[..., order], self.predicted[..., order], self.ahead)

    @staticmethod
    def nbytes(steps: int, shape: tuple[int, int], kept: int) -> int:
        """Bytes that `draw` of these sizes keeps."""
        return steps * shape[0] * shape[1] * (3 * kept + kept // LOOK_AHEAD_PART) * 8


class ReplaySelector:
    """Selects as `inner` does, so that this takes its time, and gives replayed tokens instead of the result.

    Which step it is follows from the step's first position, on the device: a captured
    graph replays the right one. After the last step the first comes again. All layers get the same tokens.

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
        self._last_layer = 0
        self._number: Tensor | None = None

    def select(self, layer: int, query: Tensor, step: Step) -> Selection:
        """The step's selection, its tokens `[B, Hkv, most_kept]` replayed."""
        selection = self._inner.select(layer, query, step)
        if layer <= self._last_layer or self._number is None:
            # The first layer of a step; every look-ahead runs behind it.
            self._number = self._position(step)
        self._last_layer = layer
        tokens = self._selections.tokens.index_select(0, self._number)[0, ..., : step.most_kept]
        return dataclasses.replace(selection, tokens=tokens)

    def predict(self, layer: int, query: Tensor, step: Step) -> Tensor:
        """The step's predicted tokens `[B, Hkv, most_kept]` int64."""
        self._inner.predict(layer, query, step)
        return self._selections.predicted.index_select(0, self._position(step))[0, ..., : step.most_kept]

    def look_ahead(self, layer: int, selection: Selection, step: Step, width: int) -> Tensor:
        """The tokens `[B, Hkv, width]` int64 that look ahead to the next step."""
        self._inner.look_ahead(layer, selection, step, width)
        assert self._number is not None, "a selection comes before its look-ahead"
        return self._selections.ahead.index_select(0, self._number)[0, ..., :width]

    def _position(self, step: Step) -> Tensor:
        """Number of the step among those replayed, `[1]` int64."""
        return (step.positions[:1] - self._first_position) % len(self._selections.tokens)
