"""Ways to decode the same context: as it is, with one part switched off, and as the paper does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ds_offload.bench.paper_mechanism import PaperScheduler
from ds_offload.bench.selections import ReplayedSelections, ReplaySelector
from ds_offload.config import OffloadConfig
from ds_offload.decoder import DecoderStack
from ds_offload.errors import InputError
from ds_offload.kernels.admit_state import AdmitResult
from ds_offload.kernels.arriving import Arriving
from ds_offload.kv_context import KVContext

# 2 ** 32 over the golden ratio: its multiples are spread evenly over every range.
SHUFFLE_PRIME = 2654435761
# With the store on the device no row is fetched.
FETCHING = ("paper", "unsorted", "no-hot-set", "compute-only")

Change = Callable[[DecoderStack, KVContext], None]


@dataclass(frozen=True)
class Variant:
    """One way to decode.

    Attributes:
        name: As in the report and in --variants.
        changes: Fields of the config that differ from the user's.
        change: What else differs, done to the context before its first step.
        ordered: Whether selections come in ascending order.
        moves_rows: Whether rows really are copied.
    """

    name: str
    changes: dict[str, Any] = field(default_factory=dict)
    change: Change | None = None
    ordered: bool = True
    moves_rows: bool = True


def _shuffle_rows(decoder: DecoderStack, context: KVContext) -> None:
    """Rows are fetched in a scattered order; which rows, and where to, stays the same.

    Entry i of a list of n takes the place of entry i * p mod n, p a prime: a permutation
    for every n, of which the device alone knows how large it is. It costs four launches a gather.
    """
    assert context.hot_set is not None, "the store is on the host"
    gather, arriving = context.store.gather, context.hot_set.arriving
    # Made here, in front of every stream's first use of it.
    multiples = SHUFFLE_PRIME * torch.arange(context.most_kept, device=context.store.device)

    def gather_shuffled(
        layer: int, tokens: Tensor, slots: Tensor, out: Tensor, counts: Tensor, timer: Tensor | None
    ) -> None:
        order = multiples[: tokens.shape[-1]] % counts.clamp(min=1)[..., None]
        gather(layer, tokens.gather(-1, order), slots.gather(-1, order), out, counts, timer)

    def arriving_shuffled(layer: int, admitted: AdmitResult, timer: Tensor | None) -> Arriving | None:
        order = multiples[: admitted.missing.shape[-1]] % admitted.moved.clamp(min=1)[..., None]
        lists = {name: getattr(admitted, name).gather(-1, order) for name in ("missing", "missing_places")}
        return arriving(layer, replace(admitted, **lists), timer)

    context.store.gather = gather_shuffled  # type: ignore[assignment, method-assign]
    context.hot_set.arriving = arriving_shuffled  # type: ignore[method-assign]


def _fetch_nothing(decoder: DecoderStack, context: KVContext) -> None:
    """Everything but the copies: what would remain with a link of no cost."""
    context.store.gather = lambda *_: None  # type: ignore[method-assign]
    assert context.hot_set is not None, "the store is on the host"
    context.hot_set.arriving = lambda *_: None  # type: ignore[method-assign]


def _launch_eagerly(decoder: DecoderStack, context: KVContext) -> None:
    decoder.capturable = False


def _fetch_everything(decoder: DecoderStack, context: KVContext) -> None:
    scheduler: Any = PaperScheduler(context, layers=decoder.layers, scaling=decoder.scaling)
    context.scheduler = scheduler


PAPER = Variant("paper", {"hot_set": 0}, _fetch_everything, ordered=False)
OURS = Variant("ours")
_SWITCHED = (
    Variant("unsorted", change=_shuffle_rows),
    Variant("no-hot-set", {"hot_set": 0}),
    Variant("prefetch-exact", {"prefetch": "exact"}),
    Variant("prefetch-speculative", {"prefetch": "speculative"}),
    Variant("prefetch-off", {"prefetch": "off"}),
    Variant("no-graph", change=_launch_eagerly),
    Variant("compute-only", change=_fetch_nothing, moves_rows=False),
)
VARIANTS = {variant.name: variant for variant in (PAPER, OURS, *_SWITCHED)}


def choose_variants(names: str | None, config: OffloadConfig, cuda: bool) -> list[Variant]:
    """The variants called `names`, with commas between them; None are all that differ from the config.

    Raises:
        InputError: A name that is not known.
    """
    if names is not None:
        wanted = [name.strip() for name in names.split(",") if name.strip()]
        for name in wanted:
            if name not in VARIANTS:
                raise InputError(f"variants={name!r} is unknown; use some of {', '.join(VARIANTS)}")
            if name in FETCHING and config.kv_location == "gpu":
                raise InputError(f"variants={name!r} is about rows from the host; use --kv-location host with it")
        if not wanted:
            raise InputError(f"variants={names!r} is empty; use some of {', '.join(VARIANTS)}")
        return [VARIANTS[name] for name in dict.fromkeys(wanted)]
    given = config.to_dict()
    left_out = set() if cuda else {"no-graph"}
    if config.kv_location == "gpu":
        left_out |= set(FETCHING)
    return [
        variant
        for variant in VARIANTS.values()
        if variant.name not in left_out
        and not (
            variant.change is None
            and variant.changes
            and all(given[name] == value for name, value in variant.changes.items())
        )
    ]


def apply_variant(
    variant: Variant,
    decoder: DecoderStack,
    context: KVContext,
    selections: ReplayedSelections | None,
    first_position: int,
) -> None:
    """Make `context` decode as `variant` says, from replayed selections where there are any."""
    if variant.change is not None:
        variant.change(decoder, context)
    if selections is not None:
        replayed = selections if variant.ordered else selections.shuffled()
        scheduler: Any = context.scheduler
        scheduler.selector = ReplaySelector(scheduler.selector, replayed, first_position)
