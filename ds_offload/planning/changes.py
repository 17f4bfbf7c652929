"""The smallest changes that make a request fit, as flags of the command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

from ds_offload.config import HOT_SETS, TOP_P_CAP, TokenBudget
from ds_offload.dtypes import QUANTISED_BITS, dtype_name
from ds_offload.errors import InputError
from ds_offload.families import check_supported
from ds_offload.planning.request import MemoryLimits, Request, memory_text

# Contexts beyond this are not looked at.
LONGEST = 1 << 30
# A budget is halved so often at most, and a context shortened to this share at least, before changes are combined.
HALVINGS = 2
LEAST_SHARE = Fraction(1, 2)

# Fields of a config, and `batch`, with other values.
Change = dict[str, Any]


def fits(request: Request, limits: MemoryLimits) -> bool:
    """Whether a request's plan is within the limits, its prefill streamed if need be, at any dtype it may choose."""
    if request.config.kv_dtype == "auto":
        return any(fits(choice, limits) for choice in _stored_as(request))
    return limits.shortage(request.plan(limits.gpu)) is None


def settle(request: Request, limits: MemoryLimits) -> Request:
    """The request with a K/V dtype and a hot set where they were left open.

    The dtype is the first of the model's own, int8 and int4 with which it fits at all, else
    the last. The hot set is the largest of `HOT_SETS` that fits, else the least. It is never
    there beside a prompt's workspace, so it decides nothing about streaming the prefill.
    """
    if request.config.kv_dtype == "auto":
        stored = _stored_as(request)
        request = next((choice for choice in stored if fits(choice, limits)), stored[-1])
    if request.config.hot_set is not None:
        return request
    choices = [request.of(hot_set=multiple) for multiple in HOT_SETS]
    return next((choice for choice in choices if _device_holds(choice, limits)), choices[-1])


def _stored_as(request: Request) -> list[Request]:
    """The request with K/V of the model's dtype, then quantised to fewer and fewer bits."""
    return [request.of(kv_dtype=name) for name in (dtype_name(request.source.dtype), *QUANTISED_BITS)]


def _device_holds(request: Request, limits: MemoryLimits) -> bool:
    """Whether what grows with the hot set fits: a store too large for the host is none of its business."""
    short = limits.shortage(request.plan(limits.gpu))
    return short is None or short.place == "disk" or (limits.gpu is not None and short.place == "host memory")


def find_changes(request: Request, limits: MemoryLimits) -> list[str] | None:
    """Flags such as "--hot-set 1.25" that make a request fit: [] where it does, None where nothing helps.

    Tried alone, in this order: a smaller hot set, K/V at fewer bits, a smaller token budget, a
    context of at least half the length, fewer sequences. Then together: the smallest hot set with a
    smaller budget; both with any context; all of them, less what is not needed beside the others.
    The plan of what is returned fits.
    """
    if fits(request, limits):
        return []
    for change in _candidates(request, limits):
        if fits(_changed(request, change), limits):
            return _flags(_needed(request, change, limits))
    return None


def disk_instead(request: Request, limits: MemoryLimits) -> int | None:
    """Bytes of a disk that K/V take in files (`kv_dir`), where that alone makes a request fit; else None."""
    if request.config.kv_dir is not None or request.config.kv_location != "host" or fits(request, limits):
        return None
    files = settle(request.of(kv_dir="."), limits)
    plan = files.plan(limits.gpu)
    return plan.disk_kv if limits.shortage(plan) is None else None


def kv_dir_hint(disk: int | None) -> str:
    """What a refusal says of `disk_instead`'s bytes, behind other remedies."""
    return "" if disk is None else f"; or keep K/V in files: --kv-dir FOLDER with {memory_text(disk)} free, far slower"


def _changed(request: Request, change: Change) -> Request:
    fields = dict(change)
    batch = fields.pop("batch", request.batch)
    return dataclasses.replace(request.of(**fields) if fields else request, batch=batch)


def _needed(request: Request, change: Change, limits: MemoryLimits) -> Change:
    """A change that fits without what it fits without, too."""
    for name in change:
        less = {field: value for field, value in change.items() if field != name}
        if fits(_changed(request, less), limits):
            return _needed(request, less, limits)
    return change


def _flags(change: Change) -> list[str]:
    names = {"hot_set": "hot-set", "kv_dtype": "kv-dtype", "token_budget": "token-budget", "max_context": "ctx"}
    flags = []
    for name, value in change.items():
        text = f"{value:g}" if name == "hot_set" else str(value)
        if name == "max_context" and value % 1024 == 0:
            text = f"{value // 1024}k"
        flags.append(f"--{names.get(name, name)} {text}")
    return flags


def _candidates(request: Request, limits: MemoryLimits) -> Iterator[Change]:
    """Changes of a request, the preferred first."""
    half = int(LEAST_SHARE * max(request.capacities))
    yield from _hot_sets(request)
    yield from _fewer_bits(request)
    yield from _budgets(request)
    yield from _shorter(request, limits, half)
    yield from _fewer(request, limits)
    unchanged: Change = {}
    least_rows = [unchanged, *_hot_sets(request)][-1]
    both = [least_rows | budget for budget in _budgets(request)]
    yield from both
    few_rows, fewest_rows = _changed(request, least_rows), _changed(request, both[-1])
    yield from (least_rows | context for context in _shorter(few_rows, limits, half))
    yield from (both[-1] | context for context in _shorter(fewest_rows, limits, half))
    yield from (both[-1] | batch for batch in _fewer(fewest_rows, limits))
    yield from (both[-1] | context for context in _shorter(fewest_rows, limits, 1))
    if request.prompts is None and request.batch > 1:
        alone = both[-1] | {"batch": 1}
        yield from (alone | context for context in _shorter(_changed(request, alone), limits, 1))


def _hot_sets(request: Request) -> Iterator[Change]:
    for multiple in HOT_SETS:
        if multiple < request.config.hot_set_multiple:
            yield {"hot_set": multiple}


def _fewer_bits(request: Request) -> Iterator[Change]:
    """K/V quantised, where they were asked for at more bits; "auto" has tried that already."""
    asked = request.config.kv_dtype
    bits = 0 if asked == "auto" else QUANTISED_BITS.get(asked, 16)
    for name, fewer in QUANTISED_BITS.items():
        if fewer < bits:
            yield {"kv_dtype": name}


def _budgets(request: Request) -> Iterator[Change]:
    """Half of the budget, and half of that."""
    budget = request.config.budget
    for halving in range(1, HALVINGS + 1):
        if budget.count is not None:
            smaller = TokenBudget(count=max(1, budget.count >> halving))
        else:
            smaller = TokenBudget(fraction=(budget.fraction or TOP_P_CAP) / 2**halving)
        yield {"token_budget": str(smaller)}


def _shorter(request: Request, limits: MemoryLimits, least: int) -> Iterator[Change]:
    """The longest context that fits, a whole number of 1,024 tokens where that is still `least` or more."""
    least = max(least, request.least_context)
    longest = longest_context(request, limits, request.context - 1)
    rounded = longest // 1024 * 1024
    if longest >= least:
        yield {"max_context": rounded if rounded >= least else longest}


def _fewer(request: Request, limits: MemoryLimits) -> Iterator[Change]:
    """The most sequences that fit; a request that names its prompts keeps them."""
    if request.prompts is None:
        batch = _most(lambda count: fits(dataclasses.replace(request, batch=count), limits), request.batch - 1)
        if batch:
            yield {"batch": batch}


def longest_context(request: Request, limits: MemoryLimits, most: int | None = None) -> int:
    """The longest `max_context`, up to `most`, that fits with everything else as it is; 0 where none does."""
    most = _longest_supported(request) if most is None else most
    return _most(lambda context: fits(request.of(max_context=context), limits), most)


def _longest_supported(request: Request) -> int:
    """The longest context that the model's attention allows: that of a sliding window, where it has one."""
    try:
        check_supported(request.source.config, LONGEST)
    except InputError:
        return int(request.source.config.sliding_window)
    return LONGEST


def _most(holds: Callable[[int], bool], most: int) -> int:
    """The largest number of 1 to `most` that `holds`, 0 where none does; all below one that holds do, too."""
    low, high = 0, max(0, most)
    while low < high:
        middle = (low + high + 1) // 2
        if holds(middle):
            low = middle
        else:
            high = middle - 1
    return low
