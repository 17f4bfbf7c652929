"""What selections moved and found, counted."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple, dataclass


@dataclass(frozen=True)
class Traffic:
    """Counts of one layer or of several, summed over heads, sequences and steps.

    Attributes:
        moved: Rows copied over the link.
        selected: Rows that were selected and attended (the window's not counted).
        old: Of those, rows on the device since an earlier step.
        predicted: Rows selected by true queries, with rows kept from the step before.
        recalled: Of those, rows that the step before had selected or fetched ahead.
    """

    moved: int
    selected: int
    old: int
    predicted: int
    recalled: int

    @property
    def hit_rate(self) -> float | None:
        """Share of the attended selected rows that an earlier step had left on the device."""
        return self.old / self.selected if self.selected else None

    @property
    def recall(self) -> float | None:
        """Share of the selection that the step before had selected or fetched ahead."""
        return self.recalled / self.predicted if self.predicted else None

    @staticmethod
    def total(layers: Iterable[Traffic]) -> Traffic:
        """The sum of several layers."""
        return Traffic(*(sum(column) for column in zip(*map(astuple, layers), strict=True)))
