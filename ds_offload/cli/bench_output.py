"""Where a benchmark runs and what becomes of its rows: the options that all of them share, and the report."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ds_offload.cli.option_groups import add_options, option

if TYPE_CHECKING:
    import torch

    from ds_offload.bench.report import BenchRow

SAMPLES = {"cuda": 30, "cpu": 7}
# Of the table where there is no terminal: nothing is cut.
TABLE_WIDTH = 300

Work = Callable[[], tuple["list[BenchRow]", list[str], dict[str, Any]]]


@dataclasses.dataclass(frozen=True)
class Output:
    """Where a benchmark runs and what becomes of its rows."""

    device: str = "auto"
    json: bool = False
    plot: str | None = None
    samples: str | None = None


def _of_run(name: str, help: str, metavar: str, default: str) -> Any:
    return option(str, name, help=help, panel="Run and output", metavar=metavar, default=default)


_OUTPUT = {
    "device": _of_run("--device", "Where it runs.", "auto|cuda|cpu", "auto"),
    "plot": _of_run("--plot", "Picture of the rows; needs matplotlib.", "FILE.png", "none"),
    "json": Annotated[
        bool | None,
        typer.Option("--json", metavar="", help="Print one JSON object on stdout.", rich_help_panel="Run and output"),
    ],
}
_SAMPLES = _of_run("--samples", "Samples of each time.", "N", "30 on a GPU, 7 on a CPU")


def output_options(command: Callable[..., None]) -> Callable[..., None]:
    """Adds --device, --json and --plot; the command gets them as `output: Output`, the picture's file checked."""
    return add_options(command, "output", _OUTPUT, _build_output)


def kernel_options(**sizes: tuple[str, str, str]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Adds the same, --samples and sizes; the command gets the sizes that were given as `sizes: dict[str, str]`.

    Args:
        **sizes: Metavar, help and default of each, under the option's name.
    """
    options = {
        name: option(
            str,
            "--" + name.replace("_", "-"),
            help=help,
            panel="Sizes",
            metavar=metavar,
            default=default,
        )
        for name, (metavar, help, default) in sizes.items()
    }

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        with_output = add_options(command, "output", _OUTPUT | {"samples": _SAMPLES}, _build_output)
        return add_options(with_output, "sizes", options)

    return decorate


def _build_output(values: dict[str, Any]) -> Output:
    output = Output(**values)
    if output.plot is not None:
        from ds_offload.bench.report import check_plot

        check_plot(output.plot)
    return output


def count_samples(output: Output, device: torch.device) -> int:
    """Samples of each time: those asked for, else as many as suit the device; InputError for what is no count."""
    from ds_offload.bench.sizes import parse_count

    return SAMPLES[device.type] if output.samples is None else parse_count(output.samples, "samples")


def report_rows(bench: str, device: torch.device, output: Output, work: Work) -> None:
    """Do the work on `device`; then the JSON object on stdout, the table on stderr and the picture."""
    import torch
    from rich.console import Console

    from ds_offload.bench.environment import Environment
    from ds_offload.bench.limits import measure_limits
    from ds_offload.bench.report import Report
    from ds_offload.notices import notice

    environment = Environment.of(device)
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        rows, notes, options = work()
        report = Report(bench, environment, measure_limits(device), options, rows, notes)
    if device.type == "cpu":
        notice("no CUDA device was used: these are times of the CPU's code, by default at small sizes")
    if output.json:
        print(json.dumps(report.to_dict()), flush=True)
    terminal = Console(stderr=True).is_terminal
    report.print_table(Console(stderr=True, width=None if terminal else TABLE_WIDTH))
    if output.plot is not None:
        report.save_plot(output.plot)
