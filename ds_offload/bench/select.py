"""`ds-offload bench select`: the best tokens by score, against torch's top-k and one reading of the scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ds_offload.bench.limits import measure_limits
from ds_offload.bench.report import BenchRow
from ds_offload.bench.sizes import check_room, kept_tokens
from ds_offload.bench.timing import Stopwatch
from ds_offload.config import TokenBudget
from ds_offload.kernels.select import select_tokens
from ds_offload.notices import notice

# Calls that follow each other read scores of at least so many bytes in all: more than a level 2 cache holds.
ROTATED_BYTES = 256 << 20
MOST_COPIES = 64


@dataclass(frozen=True)
class SelectSizes:
    """Score matrices `[1, rows, tokens]`, one case each, of which the budget's share is selected."""

    shapes: tuple[tuple[int, int], ...]
    budget: TokenBudget

    @classmethod
    def default(cls, device: torch.device) -> SelectSizes:
        """The heads of one layer at several contexts on a GPU, small sizes on a CPU."""
        shapes: tuple[tuple[int, int], ...] = ((2, 1 << 11), (2, 1 << 13))
        if device.type == "cuda":
            shapes = ((32, 1 << 14), (32, 1 << 16), (32, 1 << 18), (8, 1 << 19))
        return cls(shapes, TokenBudget.parse("1/16"))

    @staticmethod
    def copies(device: torch.device, nbytes: int) -> int:
        """How many different score matrices of `nbytes` bytes are read in turn."""
        return max(1, min(MOST_COPIES, ROTATED_BYTES // nbytes)) if device.type == "cuda" else 2


def bench_select(device: torch.device, sizes: SelectSizes, samples: int) -> list[BenchRow]:
    """Time `select_tokens`, `torch.topk`, and `torch.topk` with its indices sorted.

    The limit is the time of reading the scores once and writing the tokens.

    Raises:
        InputError: A budget that depends on scores, or scores that do not fit the memory.
    """
    for rows, tokens in sizes.shapes:
        kept_tokens(sizes.budget, tokens)
        nbytes = rows * tokens * 4
        # top-k works on copies of the scores and on 64-bit indices.
        check_room(device, gpu=(sizes.copies(device, nbytes) + 4) * nbytes)
    watch = Stopwatch(device, samples)
    results = []
    for rows, tokens in sizes.shapes:
        notice(f"bench select: {rows} x {tokens:,} scores")
        results += _cases(rows, tokens, sizes, watch)
    return results


def _cases(rows: int, tokens: int, sizes: SelectSizes, watch: Stopwatch) -> list[BenchRow]:
    device, kept = watch.device, kept_tokens(sizes.budget, tokens)
    generator = torch.Generator(device).manual_seed(0)
    copies = sizes.copies(device, rows * tokens * 4)
    scores = torch.empty(copies, 1, rows, tokens, device=device).normal_(generator=generator)
    last = torch.tensor([tokens], device=device)
    keep = torch.tensor([kept], device=device)
    out = torch.empty(1, rows, kept, dtype=torch.int64, device=device)

    def ours(one: Tensor) -> None:
        select_tokens(one, 0, last, keep, kept, out)

    def topk(one: Tensor) -> None:
        one.topk(kept, -1, sorted=False)

    def topk_and_sort(one: Tensor) -> None:
        one.topk(kept, -1, sorted=False).indices.sort(-1)

    nbytes = rows * tokens * 4 + rows * kept * 8
    limit = measure_limits(device).memory_s(nbytes)
    methods: dict[str, Callable[[Tensor], None]] = {
        "select_tokens": ours,
        "torch.topk": topk,
        "torch.topk, sorted indices": topk_and_sort,
    }
    results = []
    for name, method in methods.items():
        timing = watch.time([partial(method, one) for one in scores])
        figures: dict[str, Any] = {"rows": rows, "tokens": tokens, "kept": kept, "bytes": nbytes}
        figures["gb_per_s"] = nbytes / timing.median / 1e9
        results.append(BenchRow.of(f"{rows} x {tokens:,}, {name}", timing, "us", limit, **figures))
    return results
