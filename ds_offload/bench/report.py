"""A benchmark's rows: as JSON, as a table and as a picture."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ds_offload.bench.environment import Environment
from ds_offload.bench.limits import Limits
from ds_offload.bench.timing import Timing
from ds_offload.calibration_file import check_writable
from ds_offload.errors import InputError

UNITS = {"s": 1.0, "ms": 1e3, "us": 1e6}
PICTURES = (".png", ".pdf", ".svg")


# Rows whose times differ by more than this factor are drawn on a logarithmic scale.
WIDE_RANGE = 20


@dataclass(frozen=True)
class BenchRow:
    """One measured time.

    Attributes:
        name: What was timed.
        median, p20, p80: Percentiles of the repeated timings, in `unit`.
        unit: "s", "ms" or "us".
        limit: The time that the stated limit allows, in `unit`; None where there is none.
        extra: Other figures by name, such as bytes or hit_rate; they stand beside the others in JSON.
    """

    name: str
    median: float
    p20: float
    p80: float
    unit: str
    limit: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, timing: Timing, unit: str, limit_s: float | None = None, **extra: Any) -> BenchRow:
        """A row of a timing and a limit in seconds, put into `unit`."""
        scale = UNITS[unit]
        limit = None if limit_s is None else scale * limit_s
        return cls(name, scale * timing.median, scale * timing.p20, scale * timing.p80, unit, limit, extra)

    @property
    def ratio(self) -> float | None:
        """The median over the limit; None where there is no limit."""
        return self.median / self.limit if self.limit else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        figures = {"name": self.name, "median": self.median, "p20": self.p20, "p80": self.p80, "unit": self.unit}
        return figures | {"limit": self.limit, "ratio": self.ratio} | self.extra


@dataclass(frozen=True)
class Report:
    """A benchmark's result.

    Attributes:
        bench: Its name.
        options: What was asked for, by name.
        limits: The bandwidths that the rows' limits are computed from.
        notes: A line for everything that was left out, and why.
    """

    bench: str
    environment: Environment
    limits: Limits
    options: dict[str, Any]
    rows: list[BenchRow]
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "bench": self.bench,
            "device": self.environment.device,
            "versions": self.environment.versions,
            "commit": self.environment.commit,
            "options": self.options,
            "limits": self.limits.to_dict(),
            "notes": self.notes,
            "rows": [row.to_dict() for row in self.rows],
        }

    def print_table(self, console: Console) -> None:
        """Show the rows with every figure that some row has."""
        extras = list(dict.fromkeys(name for row in self.rows for name in row.extra))
        table = Table(title=f"{self.bench} on {self.environment.device}", title_justify="left")
        table.add_column("row")
        for column in ("median", "p20", "p80", "unit", "limit", "ratio", *extras):
            table.add_column(column, justify="right")
        for row in self.rows:
            figures = (row.median, row.p20, row.p80, row.unit, row.limit, row.ratio)
            table.add_row(row.name, *(_cell(value) for value in figures), *(_cell(row.extra.get(n)) for n in extras))
        console.print(table)
        for note in self.notes:
            console.print(note, highlight=False, markup=False)

    def save_plot(self, path: str) -> None:
        """Draw medians as bars from p20 to p80, limits as marks, and save the picture.

        Raises:
            InputError: matplotlib is not installed, or `path` cannot be written.
        """
        check_plot(path)
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        places = range(len(self.rows))
        figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.32 * len(self.rows)), layout="constrained")
        spread = [[row.median - row.p20 for row in self.rows], [row.p80 - row.median for row in self.rows]]
        axes.barh(places, [row.median for row in self.rows], xerr=spread, color="#4878a8", ecolor="#333333")
        marks = [(row.limit, place) for place, row in enumerate(self.rows) if row.limit is not None]
        if marks:
            axes.plot(*zip(*marks, strict=True), "|", color="#c04040", markersize=14, markeredgewidth=2, label="limit")
            axes.legend()
        axes.set_yticks(places, [row.name for row in self.rows])
        axes.invert_yaxis()
        shown = [row.median for row in self.rows if row.median > 0]
        if shown and max(shown) > WIDE_RANGE * min(shown):
            axes.set_xscale("log")
        axes.set_xlabel(", ".join(dict.fromkeys(row.unit for row in self.rows)))
        axes.set_title(f"{self.bench} on {self.environment.device}")
        figure.savefig(path, dpi=150)
        pyplot.close(figure)


def check_plot(path: str) -> None:
    """Refuse a picture that `Report.save_plot` could not save.

    Raises:
        InputError: Another kind of file than `PICTURES`, one that cannot be written, or no matplotlib.
    """
    if Path(path).suffix.lower() not in PICTURES:
        raise InputError(f"--plot {path!r} is no picture; give a file name that ends in one of {', '.join(PICTURES)}")
    check_writable(path)
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("--plot needs matplotlib, which is not installed; run: pip install matplotlib")


def _cell(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "-", True: "yes", False: "no"}[value]
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
