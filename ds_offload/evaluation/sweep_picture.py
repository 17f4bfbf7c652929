"""A sweep as a table and as a picture: loss against bytes moved per token."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from ds_offload.bench.report import check_plot
from ds_offload.evaluation.result import EvalResult
from ds_offload.label_setting import label_name

_COLUMNS = {
    "token_budget": "budget",
    "labels": "labels",
    "label_bytes": "label bytes",
    "prefetch": "prefetch",
    "delta": "loss over dense",
    "mean_density": "mean density",
    "h2d_bytes_per_token": "bytes moved per token",
}
_MARKERS = {"off": "o", "exact": "s", "speculative": "^"}


def print_sweep(result: EvalResult, console: Console) -> None:
    """Show a row of every point, the least loss first."""
    positions, texts = result.options["positions"], ", ".join(result.options["texts"])
    title = (
        f"{result.model}: dense loss {result.dense['nll']:.4f} nats, last {positions} of {result.options['ctx']} tokens"
    )
    table = Table(title=f"{title}; {texts}", title_justify="left")
    for name, heading in _COLUMNS.items():
        table.add_column(heading, justify="left" if name in ("labels", "prefetch") else "right")
    for row in sorted(result.options["rows"], key=lambda row: row["delta"]):
        table.add_row(*(_cell(name, row) for name in _COLUMNS))
    console.print(table)


def save_sweep(result: EvalResult, path: str) -> None:
    """Draw loss over dense against bytes moved per token; a line for each label setting and prefetch mode.

    Raises:
        InputError: matplotlib is not installed, or `path` cannot be written.
    """
    check_plot(path)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in result.options["rows"]:
        lines.setdefault((_labels(row), row["prefetch"]), []).append(row)
    colours = {name: f"C{number}" for number, name in enumerate(dict.fromkeys(labels for labels, _ in lines))}
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for (labels, mode), rows in lines.items():
        rows = sorted(rows, key=lambda row: row["h2d_bytes_per_token"])
        moved, loss = [row["h2d_bytes_per_token"] / 2**20 for row in rows], [row["delta"] for row in rows]
        axes.plot(moved, loss, f"-{_MARKERS[mode]}", color=colours[labels], label=f"{labels}, {mode}", alpha=0.8)
        for x, y, row in zip(moved, loss, rows, strict=True):
            axes.annotate(row["token_budget"], (x, y), xytext=(4, 4), textcoords="offset points", fontsize=8)
    axes.axhline(0, color="#333333", linewidth=0.8)
    axes.set_xlabel("MiB moved to the device per token (numbers: budget)")
    axes.set_ylabel("loss over dense, nats per token")
    positions = result.options["positions"]
    axes.set_title(f"{result.model}, last {positions} of {result.options['ctx']} tokens", fontsize=11)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _labels(row: dict[str, Any]) -> str:
    return label_name(row["label_code"], row["label_channels"], row["label_bits"])


def _cell(name: str, row: dict[str, Any]) -> str:
    if name == "labels":
        return _labels(row)
    value = row[name]
    if name == "delta":
        return f"{value:+.4f}"
    if isinstance(value, float):
        return f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
