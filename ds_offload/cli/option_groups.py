"""Groups of options that several commands share, added to a command by a decorator."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, get_type_hints

import typer

from ds_offload.errors import InputError


def add_options(
    command: Callable[..., None],
    name: str | None,
    options: dict[str, Any],
    build: Callable[[dict[str, Any]], Any] = dict,
) -> Callable[..., None]:
    """A command that takes `options` from the command line and passes them on as one argument.

    Args:
        command: A function that typer can read; it has a parameter called `name`.
        name: The parameter that `build`'s result is passed as; None drops it.
        options: For each option's parameter name its `Annotated[type, typer.Option(...)]`; all default to None.
        build: Gets the values of the options, those not given left out.

    Returns:
        A function whose signature has `options` in the place of `name`.
    """

    @functools.wraps(command)
    def wrapper(**values: Any) -> None:
        given = {option: values.pop(option) for option in options}
        if name is not None:
            values[name] = build({option: value for option, value in given.items() if value is not None})
        command(**values)

    hints = get_type_hints(command, include_extras=True)
    kept = [
        parameter.replace(annotation=hints[parameter.name], kind=parameter.KEYWORD_ONLY)
        for parameter in inspect.signature(command).parameters.values()
        if parameter.name != name
    ]
    added = [
        inspect.Parameter(option, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for option, annotation in options.items()
    ]
    wrapper.__signature__ = inspect.Signature([*kept, *added])  # type: ignore[attr-defined]
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in [*kept, *added]}
    return wrapper


def read_number(text: str, kind: type[int] | type[float]) -> int | float | str:
    """`text` as a number; text that is none stays, for the class that checks it to refuse."""
    try:
        return kind(text)
    except ValueError:
        return text


def option(kind: Any, *names: str, help: str, panel: str, metavar: str, default: str) -> Any:
    """One option for `add_options`; `default` is only what the help says."""
    return Annotated[
        kind | None,
        typer.Option(*names, help=f"{help} Default: {default}.", metavar=metavar, rich_help_panel=panel),
    ]


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and how it is loaded: arguments of `OffloadedGenerator.from_pretrained` and `find_model`."""

    name: str = "smollm2-135m"
    load_format: str = "auto"
    device: str = "auto"
    dtype: str = "auto"
    rope_scaling: str | None = None


_MODEL = {
    "model": option(
        str,
        "--model",
        "-m",
        help="An alias, a hub id, a folder of safetensors or a .gguf file.",
        panel="Model",
        metavar="MODEL",
        default=ModelOptions.name,
    ),
    "load_format": option(
        str,
        "--load-format",
        help='"dummy" makes random weights of that shape, for benchmarks.',
        panel="Model",
        metavar="auto|dummy",
        default=ModelOptions.load_format,
    ),
    "device": option(
        str,
        "--device",
        help="Where the model runs.",
        panel="Model",
        metavar="auto|cuda|cpu",
        default=ModelOptions.device,
    ),
    "dtype": option(
        str,
        "--dtype",
        help="dtype of the weights.",
        panel="Model",
        metavar="auto|bf16|fp16|fp32",
        default=ModelOptions.dtype,
    ),
    "rope_scaling": option(
        str,
        "--rope-scaling",
        help="Replace the model's RoPE scaling, such as yarn:4.",
        panel="Model",
        metavar="KIND:FACTOR",
        default="the model's own",
    ),
}


def model_options(command: Callable[..., None]) -> Callable[..., None]:
    """Adds --model and how it is loaded; the command gets them as `model: ModelOptions`."""

    def build(values: dict[str, Any]) -> ModelOptions:
        if "model" in values:
            values["name"] = values.pop("model")
        if not values.get("name", "x").strip():
            raise InputError(
                "model='' is empty; give an alias such as smollm2-135m, a hub id, a folder or a .gguf file"
            )
        return ModelOptions(**values)

    return add_options(command, "model", _MODEL, build)


# The folder of a prefill that may be killed, for commands that answer one prompt.
CheckpointOption = Annotated[
    str | None,
    typer.Option(
        "--checkpoint",
        metavar="FOLDER",
        help="Keep the prefill there while it lasts, and go on with what was kept if it was killed. Default: off.",
    ),
]

# Where sessions that are named are kept, for commands that take one.
SessionsDirOption = Annotated[
    str | None,
    typer.Option("--sessions-dir", metavar="FOLDER", help="Where sessions are kept. Default: in the cache folder."),
]


_SAMPLING: dict[str, tuple[Any, str, str, str]] = {
    # name: (type of the field, metavar, help, default as the help says it)
    "max_new_tokens": (str, "TOKENS", "Most tokens of the answer.", "256"),
    "temperature": (float, "T", "0 is greedy, 1 the model's own distribution.", "0"),
    "top_k": (int, "K", "Draw among the K likeliest tokens.", "off"),
    "top_p": (float, "P", "Draw among the likeliest that reach this probability.", "off"),
    "min_p": (float, "P", "Draw among tokens of at least this share of the likeliest's.", "off"),
    "repetition_penalty": (float, "X", "Over 1 makes tokens that were there already less likely.", "off"),
    "seed": (int, "N", "Makes drawing repeatable.", "none"),
    "stop": (list[str], "TEXT", "Ends the answer before this text; may be given several times.", "none"),
}


def sampling_options(command: Callable[..., None]) -> Callable[..., None]:
    """Adds how the answer is drawn; the command gets what was given as `sampling: dict[str, Any]`.

    Its entries are fields of `SamplingParams`, not checked yet.
    """

    def build(values: dict[str, Any]) -> dict[str, Any]:
        numbers = {name: kind for name, (kind, *_) in _SAMPLING.items() if kind in (int, float)}
        return {
            name: read_number(value, numbers[name]) if name in numbers else value
            for name, value in values.items()
            if value != []
        }

    options = {
        name: option(
            list[str] if kind == list[str] else str,
            "--" + name.replace("_", "-"),
            help=help_text,
            panel="Answer",
            metavar=metavar,
            default=default,
        )
        for name, (kind, metavar, help_text, default) in _SAMPLING.items()
    }
    return add_options(command, "sampling", options, build)
