"""`ds-offload plan`: what a run would take, whether it fits, and what would make it fit."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from ds_offload.cli.config_options import config_options
from ds_offload.cli.option_groups import ModelOptions, model_options
from ds_offload.config import OffloadConfig
from ds_offload.machine.published import PUBLISHED
from ds_offload.notices import notice

DOES_NOT_FIT = 1


@config_options
@model_options
def plan(
    model: ModelOptions,
    config: OffloadConfig,
    batch: Annotated[str, typer.Option("--batch", metavar="N", help="Sequences decoded together.")] = "1",
    gpu: Annotated[
        str | None,
        typer.Option(
            "--gpu",
            metavar="NAME",
            help=f"A GPU that need not be there, by its published figures: {', '.join(PUBLISHED)}.",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", metavar="", help="Print one JSON object and nothing else.")
    ] = False,
) -> None:
    """Plan a run of --ctx tokens from the model's config alone: memory, times, and what makes it fit.

    Ends with status 0 where it fits, and 1 where it does not.
    """
    from ds_offload.bench.sizes import parse_count

    sequences = parse_count(batch, "batch")
    from ds_offload.families import describe_rope
    from ds_offload.planning.report import PlanReport, find_source, resolve_request
    from ds_offload.planning.target import find_target

    target = find_target(config, model.device, gpu)
    source = find_source(model.name, model.load_format, model.dtype, model.rope_scaling)
    request = resolve_request(source, config, sequences, target.cuda)
    report = PlanReport.make(request, target)
    line = describe_rope(source.config, request.context)
    if line is not None:
        notice(line)
    print(json.dumps(report.to_dict()) if as_json else report.text())
    if report.shortage is not None:
        raise typer.Exit(DOES_NOT_FIT)
