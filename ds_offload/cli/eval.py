"""`ds-offload eval`: how far sparse decoding is from dense decoding, on texts and on tasks."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ds_offload.cli.config_options import check_no_monitor, config_options
from ds_offload.cli.option_groups import ModelOptions, add_options, model_options, option, read_number
from ds_offload.cli.progress import ProgressReport
from ds_offload.cli.summarize import read_documents
from ds_offload.cli.text_source import read_text_file
from ds_offload.config import OffloadConfig
from ds_offload.errors import InputError
from ds_offload.notices import notice

if TYPE_CHECKING:
    from ds_offload.evaluation.result import EvalResult
    from ds_offload.evaluation.subject import EvalSubject

# Tokens of the shipped document, its question and its answer: the default context of `eval longdoc` holds them.
LONGDOC_TOKENS = 4096
TABLE_WIDTH = 200
# Fields of the config that a sweep sets itself, and the option that says to what.
IN_THE_GRID = {
    "token_budget": "--budgets",
    "label_code": "--labels",
    "label_channels": "--labels",
    "label_bits": "--labels",
    "prefetch": "--modes",
}

app = typer.Typer(
    help="Compare sparse with dense decoding: loss, retrieval, documents, agreement, benchmarks. "
    "Without --ctx a context has 8,192 tokens on a GPU and 2,048 on a CPU (longdoc: 4,096)."
)


@app.callback(invoke_without_command=True)
def _root(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit


@dataclasses.dataclass(frozen=True)
class Task:
    """What every evaluation takes besides model and configuration."""

    limit: int | None = None
    json: bool = False


def _of_task(kind: Any, name: str, help: str, metavar: str, default: str) -> Any:
    return option(kind, name, help=help, panel="Evaluation", metavar=metavar, default=default)


_TASK = {
    "limit": _of_task(str, "--limit", "Most windows of a text, or most cases.", "N", "what suits the device"),
    "json": Annotated[
        bool | None,
        typer.Option("--json", metavar="", help="Print one JSON object on stdout.", rich_help_panel="Evaluation"),
    ],
}
_TEXT = {
    "text": _of_task(list[str], "--text", "A text file; may be given several times.", "FILE", "none"),
    "positions": _of_task(
        str, "--positions", "Last tokens of a window that are decoded.", "N", "512 on a GPU, 32 on a CPU"
    ),
}
_DATA = Annotated[str, typer.Option("--data", metavar="FOLDER", help="Folder of the benchmark's own files.")]


def task_options(command: Callable[..., None]) -> Callable[..., None]:
    """Adds --limit and --json as `task: Task`, every option of the model and every field of `OffloadConfig`."""

    def build(values: dict[str, Any]) -> Task:
        return Task(_count(values.get("limit"), "limit"), bool(values.get("json")))

    return model_options(config_options(add_options(command, "task", _TASK, build)))


def text_options(command: Callable[..., None]) -> Callable[..., None]:
    """Adds --text and --positions; the command gets `texts: Texts`."""
    return add_options(command, "texts", _TEXT, Texts.read)


@dataclasses.dataclass(frozen=True)
class Texts:
    """Texts by name, and the positions of each that are scored."""

    by_name: dict[str, str]
    positions: int | None

    @classmethod
    def read(cls, values: dict[str, Any]) -> Texts:
        """The files of `--text`, read; InputError where none was given or one cannot be read."""
        files = values.get("text")
        if not files:
            raise InputError("no text was given; give --text FILE, a text longer than the context")
        return cls(read_documents(files), _count(values.get("positions"), "positions"))


def _count(text: str | None, field: str) -> int | None:
    if text is None:
        return None
    number = read_number(text, int)
    if not isinstance(number, int) or number < 1:
        raise InputError(f"{field}={text!r} must be a whole number of at least 1")
    return number


@text_options
@task_options
def ppl(model: ModelOptions, config: OffloadConfig, task: Task, texts: Texts) -> None:
    """Loss of a text's last tokens in every window of --ctx tokens, each predicted by a decode step."""
    from ds_offload.evaluation.perplexity import eval_perplexity

    _evaluate(
        model,
        config,
        task,
        lambda subject, progress: eval_perplexity(subject, texts.by_name, texts.positions, task.limit, progress),
    )


@text_options
@task_options
def agreement(model: ModelOptions, config: OffloadConfig, task: Task, texts: Texts) -> None:
    """Equal first choices, KL, attention mass and output error per layer, against dense on the same text."""
    from ds_offload.evaluation.agreement import eval_agreement

    _evaluate(
        model,
        config,
        task,
        lambda subject, progress: eval_agreement(subject, texts.by_name, texts.positions, task.limit, progress),
    )


@task_options
def retrieval(
    model: ModelOptions,
    config: OffloadConfig,
    task: Task,
    kinds: Annotated[
        str, typer.Option("--kinds", metavar="KIND,KIND", help="Which questions.")
    ] = "passkey,needles,key-value,tracing",
    text: Annotated[
        str | None, typer.Option("--text", metavar="FILE", help="Text to hide the facts in. Default: a shipped one.")
    ] = None,
    seed: Annotated[str, typer.Option("--seed", metavar="N", help="Of the first question.")] = "0",
) -> None:
    """Facts hidden in --ctx tokens, asked for; --limit is the number of questions of each kind."""
    from ds_offload.evaluation.retrieval import eval_retrieval, parse_kinds

    chosen = parse_kinds(kinds)
    filler = read_text_file(text) if text is not None else None
    first = read_number(seed, int)
    if not isinstance(first, int):
        raise InputError(f"seed={seed!r} must be a whole number")
    _evaluate(
        model,
        config,
        task,
        lambda subject, progress: eval_retrieval(subject, chosen, filler, task.limit, first, progress),
    )


@task_options
def longdoc(
    model: ModelOptions,
    config: OffloadConfig,
    task: Task,
    tasks: Annotated[
        str, typer.Option("--tasks", metavar="TASK,TASK", help="question, summary or both; summary needs rouge-score.")
    ] = "question,summary",
) -> None:
    """Questions and summaries over the shipped documents: F1 and ROUGE-L."""
    from ds_offload.evaluation.longdoc import eval_longdoc, parse_tasks

    chosen = parse_tasks(tasks)
    _evaluate(
        model,
        config,
        task,
        lambda subject, progress: eval_longdoc(subject, chosen, task.limit, progress),
        LONGDOC_TOKENS,
    )


@task_options
def longbench(model: ModelOptions, config: OffloadConfig, task: Task, data: _DATA) -> None:
    """Rows of LongBench's .jsonl files, scored by its metrics; --limit is the number of rows of each file."""
    from ds_offload.devices import resolve_device
    from ds_offload.evaluation.longbench import DEFAULT_LIMIT, eval_longbench, read_longbench

    limit = task.limit or DEFAULT_LIMIT[resolve_device(model.device).type]
    rows = read_longbench(data, limit)
    _evaluate(model, config, task, lambda subject, progress: eval_longbench(subject, rows, limit, progress))


@task_options
def mmlu(model: ModelOptions, config: OffloadConfig, task: Task, data: _DATA) -> None:
    """Questions of MMLU's csv files, by the likelihood of the letter; --limit is the number of questions."""
    from ds_offload.devices import resolve_device
    from ds_offload.evaluation.mmlu import DEFAULT_LIMIT, eval_mmlu, read_mmlu

    limit = task.limit or DEFAULT_LIMIT[resolve_device(model.device).type]
    topics = read_mmlu(data)
    _evaluate(model, config, task, lambda subject, progress: eval_mmlu(subject, topics, limit, progress))


@text_options
@task_options
def sweep(
    model: ModelOptions,
    config: OffloadConfig,
    task: Task,
    texts: Texts,
    budgets: Annotated[
        str, typer.Option("--budgets", metavar="BUDGET,BUDGET", help="Values of --token-budget.")
    ] = "1/8,1/16,1/32",
    labels: Annotated[
        str,
        typer.Option(
            "--labels", metavar="CODE,CODE", help="product, channels x bits, or bits alone at 1/16 of a key's bytes."
        ),
    ] = "product,2",
    modes: Annotated[
        str, typer.Option("--modes", metavar="MODE,MODE", help="Values of --prefetch.")
    ] = "off,speculative",
    plot: Annotated[
        str | None, typer.Option("--plot", metavar="FILE.png", help="Picture of the rows; needs matplotlib.")
    ] = None,
) -> None:
    """Loss at every budget, label setting and prefetch mode: a table, and a picture with --plot."""
    from rich.console import Console

    from ds_offload.bench.report import check_plot
    from ds_offload.evaluation.sweep import SweepGrid, eval_sweep
    from ds_offload.evaluation.sweep_picture import print_sweep, save_sweep

    grid = SweepGrid.parse(budgets, labels, modes)
    for field, flag in IN_THE_GRID.items():
        if getattr(config, field) != getattr(OffloadConfig(), field):
            raise InputError(f"--{field.replace('_', '-')} is of one run, and a sweep goes by {flag}; give it there")
    if plot is not None:
        check_plot(plot)
    result = _measure(
        model,
        config,
        lambda subject, progress: eval_sweep(subject, grid, texts.by_name, texts.positions, task.limit, progress),
    )
    # Whatever happens to the picture, the figures are out first.
    _show(result, task.json)
    print_sweep(result, Console(stderr=True, width=None if Console(stderr=True).is_terminal else TABLE_WIDTH))
    if plot is not None:
        save_sweep(result, plot)


Work = Callable[["EvalSubject", ProgressReport], "EvalResult"]


def _evaluate(model: ModelOptions, config: OffloadConfig, task: Task, work: Work, least: int = 0) -> None:
    _show(_measure(model, config, work, least), task.json)


def _measure(model: ModelOptions, config: OffloadConfig, work: Work, least: int = 0) -> EvalResult:
    """Load the model and do the work on it, with progress on stderr."""
    from ds_offload.evaluation.subject import EvalSubject, prepare

    check_no_monitor(config)
    found = dataclasses.asdict(model)
    with EvalSubject(prepare(found, config, least)) as subject, ProgressReport() as progress:
        return work(subject, progress)


def _show(result: EvalResult, as_json: bool) -> None:
    """The figures on stdout, as JSON or as a table; what they were measured with on stderr."""
    notice(result.settings())
    print(json.dumps(result.to_dict()) if as_json else "\n".join(result.lines()), flush=True)


for _command in (ppl, retrieval, longdoc, agreement, longbench, mmlu, sweep):
    _debug = Annotated[
        bool | None, typer.Option("--debug", metavar="", help="Show the traceback when something goes wrong.")
    ]
    app.command(name=_command.__name__)(add_options(_command, None, {"debug": _debug}))
