"""The outcome of one evaluation: dense and sparse figures side by side."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ds_offload.config import OffloadConfig
from ds_offload.evaluation.subject import settings_line
from ds_offload.label_setting import label_layout
from ds_offload.notices import notice

LINE_EVERY_S = 5.0

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class EvalResult:
    """Figures of one task.

    Attributes:
        task: Its name.
        model: What the user wrote.
        config: As resolved.
        measure: Which figure `delta` compares: "nll" or "score".
        dense, sparse: Figures by name; both have `measure`.
        density: Mean share of the context that was attended to; None where nothing was decoded.
        options: What was asked for, by name.
    """

    task: str
    model: str
    config: OffloadConfig
    measure: str
    dense: dict[str, Any]
    sparse: dict[str, Any]
    density: float | None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def delta(self) -> float:
        """Sparse less dense."""
        return self.sparse[self.measure] - self.dense[self.measure]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "task": self.task,
            "model": self.model,
            **self.options,
            "measure": self.measure,
            "dense": self.dense,
            "sparse": self.sparse,
            "delta": self.delta,
            "mean_density": self.density,
            "label_bytes_per_token_and_head": label_layout(self.config).row_bytes,
            "config": self.config.to_dict(),
        }

    def settings(self) -> str:
        """What the figures were measured with."""
        return settings_line(self.config, self.density)

    def lines(self) -> list[str]:
        """The single figures for people, a line each: dense, sparse and their difference."""
        names = [name for name, value in self.sparse.items() if _is_number(value) or _is_number(self.dense.get(name))]
        lines = [f"{self.task:<24}{'dense':>12}{'sparse':>12}{'delta':>12}"]
        for name in names:
            dense, sparse = self.dense.get(name), self.sparse.get(name)
            both = _is_number(dense) and _is_number(sparse) and name != "cases"
            delta = f"{sparse - dense:+.5f}" if both else ""  # type: ignore[operator]
            lines.append(f"{name:<24}{_cell(dense):>12}{_cell(sparse):>12}{delta:>12}")
        return lines


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean of at least one value."""
    return sum(values) / len(values)


def counted(items: Iterable[_Item], total: int, what: str) -> Iterator[_Item]:
    """The items one by one, and now and then how many are done on stderr."""
    started = said = time.monotonic()
    for number, item in enumerate(items):
        now = time.monotonic()
        if number and now - said >= LINE_EVERY_S:
            said = now
            left = (now - started) / number * (total - number)
            notice(f"{number:,} of {total:,} {what} done, {left:.0f} s left")
        yield item


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _cell(value: Any) -> str:
    if not _is_number(value):
        return "-"
    return f"{value:.5f}" if isinstance(value, float) else f"{value:,}"
