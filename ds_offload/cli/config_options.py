"""Every field of `OffloadConfig` as an option of the same spelling."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from ds_offload.cli.option_groups import add_options, option, read_number
from ds_offload.config import OffloadConfig
from ds_offload.errors import InputError

# field: (metavar, help, default as the help says it)
_FIELDS = {
    "max_context": (
        "TOKENS",
        "Most tokens of prompt and answer together, such as 256k.",
        "what the model was trained for",
    ),
    "token_budget": ("BUDGET", 'Tokens attended per step: 2048, 1/16 or "top-p:0.95".', ""),
    "label_code": (
        "auto|product|scalar",
        "How keys are kept on the GPU: by the nearest words of their parts, or some channels.",
        "",
    ),
    "label_channels": ("N", "Channels of every key kept by scalar labels.", "1/16 of a key's bytes"),
    "label_bits": ("16|8|4|2", "Bits per channel of scalar labels.", "2"),
    "sink_tokens": ("N", "First tokens that are always attended.", ""),
    "recent_tokens": ("N", "Last tokens that are always attended.", ""),
    "dense_layers": ("N,N", "Layers whose K/V stay on the GPU, attended in full, such as 0,1.", "none"),
    "kv_location": ("host|gpu", "Where the K/V are kept.", ""),
    "kv_dir": ("FOLDER", "Folder for files of K/V, for contexts beyond the host's memory; slower.", "none, in memory"),
    "kv_dtype": ("auto|bf16|fp16|fp32|int8|int4", "dtype of the stored K/V; auto takes fewer bits where it must.", ""),
    "prefetch": (
        "exact|speculative|off",
        "exact fetches ahead what ranked next; speculative selects by a prediction.",
        "",
    ),
    "hot_set": ("MULTIPLE", "Rows kept on the GPU, as a multiple of the budget; 0 keeps none.", "at most 4, what fits"),
    "gpu_memory": ("BYTES", "GPU memory to stay under, such as 24GiB.", "what is free"),
    "host_memory": ("BYTES", "Host memory to stay under.", "what is free"),
    "calibration": ("FILE", "File made by `ds-offload calibrate`.", "found or made"),
    "segment_tokens": ("TOKENS", "Tokens by which the host store grows.", ""),
    "monitor": (
        "warn|widen|off",
        "What to do where attention, compared with exact attention while decoding, captures too little.",
        "",
    ),
    "monitor_every": ("N", "Decode steps from one comparison to the next.", "as many as cost 1 % of the time"),
}
_EXTRA_NAMES = {"max_context": ("--ctx",), "monitor": ("--monitor-action",)}


def config_options(command: Callable[..., None]) -> Callable[..., None]:
    """Adds an option for every field of `OffloadConfig`; the command gets them as `config: OffloadConfig`.

    Raises:
        InputError: From the command, at once, where a value is out of range.
    """
    options = {}
    for field in dataclasses.fields(OffloadConfig):
        metavar, help_text, default = _FIELDS[field.name]
        names = ("--" + field.name.replace("_", "-"), *_EXTRA_NAMES.get(field.name, ()))
        options[field.name] = option(
            str,
            *names,
            help=help_text,
            panel="KV cache and selection",
            metavar=metavar,
            default=default or str(field.default),
        )
    return add_options(command, "config", options, build_config)


def build_config(values: dict[str, str]) -> OffloadConfig:
    """The config of the fields given as text; the others keep their defaults.

    Raises:
        InputError: A value out of range.
    """
    kinds = {field.name: str(field.type) for field in dataclasses.fields(OffloadConfig)}
    return OffloadConfig(**{name: _read(name, text, kinds[name]) for name, text in values.items()})


def check_no_monitor(config: OffloadConfig) -> None:
    """Refuse what the monitor would do, for commands that measure without it.

    Raises:
        InputError: It was to widen the budget, or to compare every so many steps.
    """
    given = "--monitor widen" if config.monitor == "widen" else "--monitor-every"
    if config.monitor == "widen" or config.monitor_every is not None:
        raise InputError(f"{given} has no effect here: evaluations and benchmarks run no monitor; leave it out")


def _read(name: str, text: str, kind: str) -> Any:
    """`text` as the field's type; text that is not of that type stays, for the config to refuse."""
    if kind.startswith("tuple"):
        try:
            return tuple(int(number) for number in text.split(",") if number.strip())
        except ValueError:
            raise InputError(f"{name}={text!r} must be layer numbers with commas between them, such as 0,1") from None
    if "str" not in kind and "Literal" not in kind:
        return read_number(text, int if kind.startswith("int") else float)
    return text
