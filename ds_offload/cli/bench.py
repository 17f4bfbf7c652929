"""`ds-offload bench`: times of decode steps and kernels, each next to what the link or the memory allows."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ds_offload.cli.bench_output import Output, count_samples, kernel_options, output_options, report_rows
from ds_offload.cli.config_options import check_no_monitor, config_options
from ds_offload.cli.option_groups import add_options
from ds_offload.config import OffloadConfig, TokenBudget

if TYPE_CHECKING:
    from ds_offload.bench.report import BenchRow

DECODE_DEFAULTS = {
    # device type: model, tokens, steps, warm-ups
    "cuda": ("llama-2-7b", 1 << 17, 32, 24),
    "cpu": ("smollm2-135m", 1 << 10, 4, 3),
}
PREFILL_TOKENS = {"cuda": 1 << 15, "cpu": 512}

app = typer.Typer(help="Time decode steps or kernels next to what the link or the memory allows.")


@app.callback(invoke_without_command=True)
def _root(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit


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
        bool, typer.Option("--with-transformers", metavar="", help="Time transformers' offloaded cache too; slow.")
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

    check_no_monitor(config)
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

    report_rows("decode", device, output, work)


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
        bool, typer.Option("--with-transformers", metavar="", help="Time transformers' own prefill too, where it fits.")
    ] = False,
) -> None:
    """A prompt of --ctx random tokens (default 32k on a GPU), read into a context."""
    from ds_offload.bench.prefill import PrefillSizes, bench_prefill
    from ds_offload.bench.sizes import parse_count
    from ds_offload.devices import resolve_device

    check_no_monitor(config)
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

    report_rows("prefill", device, output, work)


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
    samples = count_samples(output, device)
    report_rows("gather", device, output, lambda: (bench_gather(device, asked, samples), [], _plain(asked, samples)))


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
    samples = count_samples(output, device)
    report_rows("select", device, output, lambda: (bench_select(device, asked, samples), [], _plain(asked, samples)))


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
    samples = count_samples(output, device)
    report_rows("attention", device, output, lambda: (*bench_attention(device, asked, samples), _plain(asked, samples)))


for _command in (decode, prefill, attention, gather, select):
    _debug = Annotated[
        bool | None, typer.Option("--debug", metavar="", help="Show the traceback when something goes wrong.")
    ]
    app.command(name=_command.__name__)(add_options(_command, None, {"debug": _debug}))


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


def _plain(sizes: Any, samples: int) -> dict[str, Any]:
    """Sizes as values for JSON."""
    values = {field.name: getattr(sizes, field.name) for field in dataclasses.fields(sizes)}
    plain = {name: value if isinstance(value, int | tuple) else str(value) for name, value in values.items()}
    return plain | {"samples": samples}
