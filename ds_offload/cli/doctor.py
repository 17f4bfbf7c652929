"""`ds-offload doctor`: what this machine has, whether it works, and what to do where it does not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import torch

    from ds_offload.machine.check import Check
    from ds_offload.machine.host_memory import HostMemory

# Most that is page-locked without --pin-limit, and the share of usable memory that never is exceeded.
PIN_LIMIT = 16 << 30
PIN_SHARE = 0.8
COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}
# Of the table where there is no terminal: nothing is cut.
TABLE_WIDTH = 500


def doctor(
    device: Annotated[str, typer.Option("--device", metavar="auto|cuda|cpu", help="What to look at.")] = "auto",
    pin_limit: Annotated[
        str | None,
        typer.Option(
            "--pin-limit",
            metavar="SIZE",
            help="Most host memory to page-lock in the trial, at most 80 % of what can be used. Default: 16GiB.",
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", metavar="", help="Measure nothing and page-lock nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", metavar="", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Look at driver, software, GPU, link and memory; each problem with its cure. Status 1 where something fails.

    The measured bandwidths are kept for `plan`.
    """
    from ds_offload.config import parse_bytes
    from ds_offload.machine.check import FAIL, worst

    most = PIN_LIMIT if pin_limit is None else parse_bytes(pin_limit, "pin_limit")
    checks = list(_look(device, most, quick))
    if as_json:
        result = {"status": worst(checks), "checks": [check.to_dict() for check in checks]}
        print(json.dumps(result), flush=True)
    else:
        _print(checks)
    if worst(checks) == FAIL:
        raise typer.Exit(1)


def _look(device_name: str, pin_limit: int, quick: bool) -> Iterator[Check]:
    from ds_offload.cache_folder import cache_folder
    from ds_offload.machine import software_checks as software
    from ds_offload.machine.check import OK
    from ds_offload.machine.host_checks import host_checks
    from ds_offload.machine.host_memory import host_memory

    memory = host_memory()
    yield software.check_python()
    torch_check = software.check_torch()
    device, pinned = None, None
    if torch_check.status == OK:
        from ds_offload.devices import find_device

        # A wrong --device is refused before anything is printed.
        device = find_device(device_name)
    yield torch_check
    if device is not None:
        yield software.check_cuda(device)
        yield software.check_driver(device)
        yield software.check_triton(device)
    yield software.check_transformers()
    if device is not None:
        yield software.check_numba()
        cupy = software.check_cupy(device)
        if cupy is not None:
            yield cupy
        for check in _look_at_gpu(device, memory, pin_limit, quick):
            pinned = check.figures.get("pinned_bytes", pinned)
            yield check
    yield from host_checks(memory, device, cache_folder(), pinned)


def _look_at_gpu(device: torch.device, memory: HostMemory, pin_limit: int, quick: bool) -> Iterator[Check]:
    from ds_offload.machine.gpu_checks import gpu_checks

    share = int(PIN_SHARE * memory.usable_bytes)
    reason = f"--pin-limit {pin_limit / 2**30:g}GiB"
    if share < pin_limit:
        reason = f"{PIN_SHARE:.0%} of what can be used"
    yield from gpu_checks(device, pin_limit=max(1, min(pin_limit, share)), pin_reason=reason, quick=quick)


def _print(checks: list[Check]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        console = Console(width=TABLE_WIDTH)
    table = Table(box=None, pad_edge=False)
    for name in ("check", "status", "found", "cure"):
        table.add_column(name, overflow="fold")
    for check in checks:
        table.add_row(
            Text(check.name), Text(check.status, style=COLOURS[check.status]), Text(check.value), Text(check.cure)
        )
    console.print(table)
