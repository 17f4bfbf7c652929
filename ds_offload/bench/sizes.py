"""Sizes that a benchmark is asked for: read, and refused where they do not fit."""

from __future__ import annotations

import psutil
import torch

from ds_offload.config import TokenBudget, parse_tokens
from ds_offload.errors import InputError, MemoryPlanError
from ds_offload.memory.plan import CUDA_RESERVE_BYTES

MOST_SEQUENCES = 1 << 16  # far more than any GPU decodes together


def parse_sizes(text: str, field: str) -> tuple[int, ...]:
    """Numbers with commas between them, such as "16k,64k", each at least 1.

    Raises:
        InputError: Anything else.
    """
    parts = [part for part in text.split(",") if part.strip()]
    if not parts:
        raise InputError(f"{field}={text!r} is empty; give numbers with commas between them, such as 16k,64k")
    return tuple(parse_count(part, field) for part in parts)


def parse_count(text: str, field: str) -> int:
    """One number, at least 1; a batch is at most `MOST_SEQUENCES`.

    Raises:
        InputError: Anything else.
    """
    count = parse_tokens(text, field) if field == "ctx" else parse_tokens(text, field, "a whole number such as 8")
    if field == "batch" and count > MOST_SEQUENCES:
        raise InputError(f"batch={text!r:.60} must be at most {MOST_SEQUENCES:,} sequences; give a smaller one")
    return count


def kept_tokens(budget: TokenBudget, tokens: int) -> int:
    """Tokens that a budget keeps of `tokens`.

    Raises:
        InputError: A budget that depends on the scores.
    """
    if budget.top_p is not None:
        raise InputError(f"token_budget={budget} depends on the scores; give a count or a fraction such as 1/16")
    return budget.tokens(tokens)


def check_room(
    device: torch.device, *, gpu: int = 0, host: int = 0, gpu_limit: int | None = None, host_limit: int | None = None
) -> None:
    """Refuse sizes that the memory has no room for.

    Args:
        gpu: Bytes wanted on `device`; on a CPU they count as host bytes.
        host: Bytes wanted on the host.
        gpu_limit, host_limit: Bytes to stay under where that is less than what is free.

    Raises:
        MemoryPlanError: There is less, naming both.
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + cached
        _compare("GPU", gpu + CUDA_RESERVE_BYTES, free, gpu_limit)
    else:
        host += gpu
    _compare("host", host, psutil.virtual_memory().available, host_limit)


def _compare(place: str, needed: int, free: int, limit: int | None) -> None:
    there = free if limit is None else min(free, limit)
    if needed > there:
        raise MemoryPlanError(
            f"these sizes need {needed / 2**30:.2f} GiB of {place} memory and {there / 2**30:.2f} GiB are there; "
            "give smaller sizes"
        )
