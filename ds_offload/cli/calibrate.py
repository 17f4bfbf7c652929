"""`ds-offload calibrate`: fits a model's labels to a text and writes what they are made by to a file."""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Annotated

import typer

from ds_offload.cli.option_groups import ModelOptions, model_options
from ds_offload.cli.progress import ProgressReport
from ds_offload.cli.text_source import read_text_file
from ds_offload.config import OffloadConfig, parse_tokens
from ds_offload.errors import InputError
from ds_offload.given_path import check_path

FEWEST_TOKENS = 64


@model_options
def calibrate(
    model: ModelOptions,
    data: Annotated[
        str | None, typer.Option("--data", metavar="FILE", help="UTF-8 text to calibrate on; default: one that ships.")
    ] = None,
    out: Annotated[
        str | None,
        typer.Option("--out", metavar="FILE", help="File to write; default: where this model's calibration is kept."),
    ] = None,
    tokens: Annotated[str, typer.Option("--tokens", metavar="TOKENS", help="Most tokens of the text to use.")] = "4096",
    as_json: Annotated[bool, typer.Option("--json", metavar="", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Fit the labels of every KV head to your own text or the one that ships.

    Without --out the result is what this model uses from now on.
    """
    most = parse_tokens(tokens, "tokens")
    if most < FEWEST_TOKENS:
        raise InputError(f"tokens={tokens!r} is too few to fit labels; give at least {FEWEST_TOKENS}")
    if model.load_format == "dummy" and out is None:
        raise InputError("a calibration of dummy weights is not kept in the cache; give --out FILE")
    document = None if data is None else read_text_file(data)
    if document is not None and len(document.encode()) < FEWEST_TOKENS - 1:
        # No tokenizer makes more tokens of it, one at the start included.
        raise InputError(_too_few(f"file {data!r}"))

    from ds_offload.calibration import SHIPPED_TEXT, cached_calibration, calibrate_loaded, shipped_text, text_ids
    from ds_offload.calibration_file import check_replaceable, check_writable
    from ds_offload.decoder import DecoderStack
    from ds_offload.devices import resolve_device
    from ds_offload.families import check_supported
    from ds_offload.loading import find_model, load_weights
    from ds_offload.memory_check import check_weights

    if out is not None:
        check_replaceable(check_path(out, "out"))
    device = resolve_device(model.device)
    source = find_model(model.name, load_format=model.load_format, dtype=model.dtype, rope_scaling=model.rope_scaling)
    check_supported(source.config, 1)
    check_weights(source, OffloadConfig(), device)
    loaded = load_weights(source, device)
    target = Path(out) if out is not None else cached_calibration(loaded.fingerprint)
    if out is None:
        with contextlib.suppress(OSError):
            target.parent.mkdir(parents=True, exist_ok=True)
        check_writable(target)
    name = SHIPPED_TEXT if data is None else Path(data).name
    ids = text_ids(loaded, shipped_text() if document is None else document, most)
    if len(ids) < FEWEST_TOKENS:
        raise InputError(_too_few(f"file {data!r}"))
    started = time.monotonic()
    with ProgressReport(("calibrate",)) as report:
        made = calibrate_loaded(
            loaded, DecoderStack(loaded.model), ids, name, lambda done, total: report("calibrate", done, total)
        )
    seconds = time.monotonic() - started
    made.save(target)
    layers, kv_heads, head_dim = made.channels.shape
    if as_json:
        figures = {
            "out": os.path.abspath(target),
            "model": model.name,
            "fingerprint": made.fingerprint,
            "tokens": made.tokens,
            "seconds": round(seconds, 3),
            "layers": layers,
            "kv_heads": kv_heads,
            "head_dim": head_dim,
        }
        print(json.dumps(figures))
    else:
        print(f"wrote {target}: {made.tokens:,} tokens of {name}, {seconds:.1f} s")


def _too_few(what: str) -> str:
    return f"{what} is too short to fit labels to; give a text of at least {FEWEST_TOKENS} tokens"
