"""The log of a training as a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_log(path: Path) -> list[dict[str, Any]]:
    """The log's rows; of steps that were made again after a crash the last ones."""
    rows: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        while rows and rows[-1]["step"] >= row["step"]:
            rows.pop()
        rows.append(row)
    return rows


def draw_curve(rows: list[dict[str, Any]], path: Path) -> None:
    """Losses, and the share of right answers at each length, over the tokens seen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, figsize=(8, 7), sharex=True, layout="constrained")
    for name in ("answers", "text"):
        shown = [(row["tokens"] / 1e6, row[name]) for row in rows if row[name] is not None]
        above.plot(*zip(*shown, strict=True), label=f"{name}, mean of a report")
    above.set_ylabel("loss, nats")
    for length in sorted({int(length) for row in rows for length in row["right"]}):
        shown = []
        for row in rows:
            cells = row["right"].get(str(length), {}).values()
            if cells:
                shown.append((row["tokens"] / 1e6, 100 * sum(c[0] for c in cells) / sum(c[1] for c in cells)))
        below.plot(*zip(*shown, strict=True), marker=".", label=f"{length:,} tokens")
    below.set_ylabel("answers right, %, forced")
    below.set_xlabel("tokens seen, millions")
    for axes in (above, below):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
