"""`ds-offload bench`: times of decode steps and kernels, each next to what the link or the memory allows."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ds_offload.cli.config_options import config_options
from ds_offload.cli.option_groups import add_options, option
from ds_offload.config import OffloadConfig, TokenBudget

if TYPE_CHECKING:
    import torch

    from ds_offload.bench.report import BenchRow

DECODE_DEFAULTS = {
    # device type: model, tokens, steps, warm-ups
    "cuda": ("llama-2-7b", 1 << 17, 32, 24),
    "cpu": ("smollm2-135m", 1 << 10, 4, 3),
}
PREFILL_TOKENS = {"cuda": 1 << 15, "cpu": 512}
SAMPLES = {"cuda": 30, "cpu": 7}
# Of the table where there is no terminal: nothing is cut.
TABLE_WIDTH = 300

app = typer.Typer(help="Time decode steps or kernels next to what the link or the memory allows.")


@app.callback(invoke_without_command=True)
def _root(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit


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
        bool | None, typer.Option("--json", help="Print one JSON object on stdout.", rich_help_panel="Run and output")
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


_BUDGET = ("BUDGET", "Share or number of the tokens that is selected.", "1/16")


@output_options
@config_options
def decode(
    output: Output,
    config: OffloadConfig,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Whose shape; its weights are made up. Default: llama-2-7b on a GPU."),
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", metavar="bf16|fp16|fp32", help="dtype of the weights.")] = "bf16",
    batch: Annotated[str, typer.Option("--batch", metavar="N", help="Sequences decoded together.")] = "1",
    steps: Annotated[
        str | None, typer.Option("--steps", metavar="N", help="Timed steps. Default: 32 on a GPU, 4 on a CPU.")
    ] = None,
    warm_ups: Annotated[
        str | None, typer.Option("--warm-ups", metavar="N", help="Steps before. Default: 24 on a GPU, 3 on a CPU.")
    ] = None,
    selections: Annotated[
        str,
        typer.Option(
            "--selections",
            metavar="replayed|random",
            help="Tokens selected: as repetitive as in real text, or what random labels give.",
        ),
    ] = "replayed",
    variants: Annotated[
        str | None,
        typer.Option(
            "--variants",
            metavar="NAME,NAME",
            help="Some of paper, ours, unsorted, no-hot-set, prefetch-exact, prefetch-speculative, prefetch-off, "
            "no-graph, compute-only. Default: all.",
        ),
    ] = None,
    with_transformers: Annotated[
        bool, typer.Option("--with-transformers", help="Time transformers' offloaded cache too; slow.")
    ] = False,
    text: Annotated[
        str | None,
        typer.Option(
            "--text", metavar="FILE", help="Load the model's own weights and read --ctx tokens of this file before."
        ),
    ] = None,
) -> None:
    """Whole decode steps over --ctx tokens (default 128k on a GPU), part by part; made up, or read from --text."""
    from ds_offload.bench.decode import DecodeSizes, bench_decode
    from ds_offload.bench.sizes import parse_count
    from ds_offload.devices import resolve_device

    device = resolve_device(output.device)
    default_model, default_tokens, default_steps, default_warm_ups = DECODE_DEFAULTS[device.type]
    tokens = config.max_context
    assert tokens is None or isinstance(tokens, int)
    sizes = DecodeSizes(
        model=default_model if model is None else model,
        dtype=dtype,
        tokens=default_tokens if tokens is None else tokens,
        sequences=parse_count(batch, "batch"),
        steps=default_steps if steps is None else parse_count(steps, "steps"),
        warm_ups=default_warm_ups if warm_ups is None else parse_count(warm_ups, "warm_ups"),
        selections=selections,
        variants=variants,
        with_transformers=with_transformers,
        text=text,
    )

    def work() -> tuple[list[BenchRow], list[str], dict[str, Any]]:
        rows, notes, resolved = bench_decode(device, sizes, config)
        return rows, notes, dataclasses.asdict(sizes) | {"config": resolved.to_dict()}

    _report("decode", device, output, work)


@output_options
@config_options
def prefill(
    output: Output,
    config: OffloadConfig,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Whose shape; its weights are made up. Default: llama-2-7b on a GPU."),
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", metavar="bf16|fp16|fp32", help="dtype of the weights.")] = "bf16",
    repeats: Annotated[str, typer.Option("--repeats", metavar="N", help="Prefills that are timed, after one.")] = "2",
    with_transformers: Annotated[
        bool, typer.Option("--with-transformers", help="Time transformers' own prefill too, where it fits.")
    ] = False,
) -> None:
    """A prompt of --ctx random tokens (default 32k on a GPU), read into a context."""
    from ds_offload.bench.prefill import PrefillSizes, bench_prefill
    from ds_offload.bench.sizes import parse_count
    from ds_offload.devices import resolve_device

    device = resolve_device(output.device)
    tokens = config.max_context
    assert tokens is None or isinstance(tokens, int)
    sizes = PrefillSizes(
        model=DECODE_DEFAULTS[device.type][0] if model is None else model,
        dtype=dtype,
        tokens=PREFILL_TOKENS[device.type] if tokens is None else tokens,
        repeats=parse_count(repeats, "repeats"),
        with_transformers=with_transformers,
    )

    def work() -> tuple[list[BenchRow], list[str], dict[str, Any]]:
        rows, notes, resolved = bench_prefill(device, sizes, config)
        return rows, notes, dataclasses.asdict(sizes) | {"config": resolved.to_dict()}

    _report("prefill", device, output, work)


@kernel_options(
    ctx=("TOKENS", "Tokens in the store.", "64k on a GPU, 4k on a CPU"),
    batch=("N", "Sequences.", "1"),
    kv_heads=("N", "KV heads.", "32 on a GPU, 2 on a CPU"),
    row_bytes=("N,N", "Bytes of a row.", "128,256,512,1024 on a GPU"),
    token_budget=_BUDGET,
)
def gather(output: Output, sizes: dict[str, str]) -> None:
    """Rows gathered from the host store, in order and not, next to the link's peak and the CPU's gather."""
    from ds_offload.bench.gather import GatherSizes, bench_gather
    from ds_offload.devices import resolve_device

    device = resolve_device(output.device)
    fields = {"ctx": "tokens", "batch": "sequences", "kv_heads": "kv_heads", "row_bytes": "row_bytes"}
    asked = _with_sizes(GatherSizes.default(device), sizes, fields)
    samples = _samples(output, device)
    _report("gather", device, output, lambda: (bench_gather(device, asked, samples), [], _plain(asked, samples)))


@kernel_options(
    rows=("N", "Rows of scores, one a KV head.", "32 on a GPU, 2 on a CPU"),
    ctx=("N,N", "Tokens of a row.", "16k,64k,256k and 8 rows of 512k on a GPU"),
    token_budget=_BUDGET,
)
def select(output: Output, sizes: dict[str, str]) -> None:
    """The best tokens by score, next to torch's top-k and to reading the scores once."""
    from ds_offload.bench.select import SelectSizes, bench_select
    from ds_offload.bench.sizes import parse_count, parse_sizes
    from ds_offload.devices import resolve_device

    device = resolve_device(output.device)
    asked = SelectSizes.default(device)
    if "rows" in sizes or "ctx" in sizes:
        rows = parse_count(sizes["rows"], "rows") if "rows" in sizes else asked.shapes[0][0]
        lengths = parse_sizes(sizes["ctx"], "ctx") if "ctx" in sizes else [length for _, length in asked.shapes]
        asked = dataclasses.replace(asked, shapes=tuple((rows, length) for length in lengths))
    asked = _with_sizes(asked, sizes, {})
    samples = _samples(output, device)
    _report("select", device, output, lambda: (bench_select(device, asked, samples), [], _plain(asked, samples)))


@kernel_options(
    batch=("N,N", "Sequences.", "1,4,16,32 on a GPU, 1,2 on a CPU"),
    ctx=("N,N", "Tokens of each.", "4k,16k,64k on a GPU, 1k on a CPU"),
    heads=("N", "Query heads.", "32 on a GPU, 4 on a CPU"),
    kv_heads=("N", "KV heads.", "32 on a GPU, 2 on a CPU"),
    head_dim=("N", "Channels of a head.", "128 on a GPU, 64 on a CPU"),
    token_budget=_BUDGET,
)
def attention(output: Output, sizes: dict[str, str]) -> None:
    """One layer's scores, selection and sparse attention on the device, next to dense attention."""
    from ds_offload.bench.attention import AttentionSizes, bench_attention
    from ds_offload.devices import resolve_device

    device = resolve_device(output.device)
    fields = {"batch": "batches", "ctx": "contexts"} | {name: name for name in ("heads", "kv_heads", "head_dim")}
    asked = _with_sizes(AttentionSizes.default(device), sizes, fields)
    samples = _samples(output, device)
    _report("attention", device, output, lambda: (*bench_attention(device, asked, samples), _plain(asked, samples)))


for _command in (decode, prefill, attention, gather, select):
    _debug = Annotated[bool | None, typer.Option("--debug", help="Show the traceback when something goes wrong.")]
    app.command(name=_command.__name__)(add_options(_command, None, {"debug": _debug}))


Work = Callable[[], tuple["list[BenchRow]", list[str], dict[str, Any]]]


def _with_sizes(defaults: Any, given: dict[str, str], fields: dict[str, str]) -> Any:
    """`defaults` with the sizes that were given; `fields` names the field of each, lists where the default is one."""
    from ds_offload.bench.sizes import parse_count, parse_sizes

    changes: dict[str, Any] = {}
    for name, field in fields.items():
        if name in given:
            parse = parse_sizes if isinstance(getattr(defaults, field), tuple) else parse_count
            changes[field] = parse(given[name], name)
    if "token_budget" in given:
        changes["budget"] = TokenBudget.parse(given["token_budget"])
    return dataclasses.replace(defaults, **changes)


def _samples(output: Output, device: torch.device) -> int:
    from ds_offload.bench.sizes import parse_count

    return SAMPLES[device.type] if output.samples is None else parse_count(output.samples, "samples")


def _plain(sizes: Any, samples: int) -> dict[str, Any]:
    """Sizes as values for JSON."""
    values = {field.name: getattr(sizes, field.name) for field in dataclasses.fields(sizes)}
    plain = {name: value if isinstance(value, int | tuple) else str(value) for name, value in values.items()}
    return plain | {"samples": samples}


def _report(bench: str, device: torch.device, output: Output, work: Work) -> None:
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
