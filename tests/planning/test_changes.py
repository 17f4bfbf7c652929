"""What makes a request fit really does, and the longest context that fits is the longest."""

from __future__ import annotations

import dataclasses
import random
import shlex
from typing import Any

import pytest

from ds_offload.cli.config_options import build_config
from ds_offload.config import HOT_SETS, OffloadConfig
from ds_offload.planning.changes import (
    LONGEST,
    _flags,
    disk_instead,
    find_changes,
    fits,
    kv_dir_hint,
    longest_context,
    settle,
)
from ds_offload.planning.report import find_source, resolve_request
from ds_offload.planning.request import MemoryLimits, Request, host_total, memory_text

MODELS = ("llama-2-7b", "llama-3.1-8b", "mixtral-8x7b", "smollm2-135m")


def request(model: str = "llama-3.1-8b", batch: int = 1, cuda: bool = True, **config: Any) -> Request:
    source = find_source(model, "auto", "auto", None)
    given = {"max_context": "128k", "hot_set": 2, "prefetch": "exact", "kv_dtype": "bf16"} | config
    return resolve_request(source, OffloadConfig(**given), batch, cuda)


def limits_of(asked: Request, gpu: float = 1, host: float = 1) -> MemoryLimits:
    """Shares of what a request takes."""
    plan = asked.plan()
    total = int(host * host_total(plan, asked.cuda))
    return MemoryLimits(int(gpu * plan.gpu_total) if asked.cuda else None, total)


def applied(asked: Request, flags: list[str]) -> Request:
    """The request that a command line with `flags` added would make."""
    words = shlex.split(" ".join(flags))
    given = dict(zip(words[::2], words[1::2], strict=True))
    names = {"--ctx": "max_context", "--hot-set": "hot_set", "--token-budget": "token_budget", "--kv-dtype": "kv_dtype"}
    batch = int(given.pop("--batch", asked.batch))
    config = build_config({names[flag]: text for flag, text in given.items()})
    fields = {names[flag]: getattr(config, names[flag]) for flag in given}
    return dataclasses.replace(asked.of(**fields), batch=batch)


def test_a_request_that_fits_needs_no_change() -> None:
    asked = request()
    assert find_changes(asked, limits_of(asked)) == []
    assert find_changes(asked, dataclasses.replace(limits_of(asked), gpu=asked.plan().gpu_total - 1)) != []


def test_a_hot_set_that_is_left_open_is_the_largest_that_fits() -> None:
    asked = request(hot_set=None)
    for multiple in HOT_SETS:
        chosen = asked.of(hot_set=multiple)
        # Where the prompt takes more than a step, a larger one may take no more.
        largest = next(m for m in HOT_SETS if asked.of(hot_set=m).plan().gpu_total <= chosen.plan().gpu_total)
        assert settle(asked, limits_of(chosen)).config.hot_set == largest >= multiple
        # What fits with any hot set fits.
        assert fits(asked, limits_of(chosen)) and longest_context(asked, limits_of(chosen)) >= asked.context
    least = limits_of(asked.of(hot_set=1))
    # Where the prompt must be streamed with the least one, too, it is the largest that fits so.
    streamed = dataclasses.replace(least, gpu=least.gpu - 1)
    larger = [asked.of(hot_set=multiple) for multiple in HOT_SETS]
    expected = next(choice for choice in larger if choice.plan(streamed.gpu).gpu_total <= streamed.gpu)
    assert settle(asked, streamed).config.hot_set == expected.config.hot_set > 1
    nothing = settle(asked, dataclasses.replace(least, gpu=1))
    assert nothing.config.hot_set == 1, "the least, where none fits"
    scarce = dataclasses.replace(limits_of(asked.of(hot_set=4)), host=1)
    assert settle(asked, scarce).config.hot_set == 4, "the host's memory does not grow with it"
    given = request(hot_set=1.25)
    assert settle(given, limits_of(asked.of(hot_set=4))) is given


@pytest.mark.parametrize("seed", range(40))
def test_changes_make_it_fit(seed: int) -> None:
    draw = random.Random(seed)
    asked = request(
        draw.choice(MODELS),
        batch=draw.choice((1, 1, 2, 7)),
        cuda=draw.random() < 0.8,
        max_context=draw.randrange(200, 400_000),
        token_budget=draw.choice(("1/16", "1/4", 2048, "top-p:0.9", "1/1")),
        hot_set=draw.choice((0, 1, 1.5, 2, 4)),
        kv_location=draw.choice(("host", "host", "gpu")),
        prefetch=draw.choice(("exact", "speculative", "off")),
    )
    limits = limits_of(asked, draw.uniform(0.05, 1.1), draw.uniform(0.1, 1.1))
    flags = find_changes(asked, limits)
    if flags is None:
        # Not even the shortest context of one sequence, with few rows.
        least = dataclasses.replace(asked.of(max_context=1, hot_set=0.0), batch=1)
        assert not fits(least, limits)
    elif flags:
        assert not fits(asked, limits)
        assert fits(applied(asked, flags), limits)
        assert not any(fits(applied(asked, [*flags[:n], *flags[n + 1 :]]), limits) for n in range(len(flags)))
    else:
        assert fits(asked, limits)


@pytest.mark.parametrize(
    ("gpu", "host", "batch", "expected"),
    [
        # With a hot set of less than three times the budget the prompt takes more than a step.
        (0.99, 1, 1, ["--hot-set 3.5"]),
        (0.97, 1, 1, ["--hot-set 3"]),
        (0.95, 1, 1, ["--kv-dtype int8"]),
        (1, 0.9, 1, ["--kv-dtype int8"]),
        (1, 0.5, 1, ["--kv-dtype int4"]),
        (1, 0.26, 4, ["--batch 1"]),
        (0.25, 1, 1, None),
    ],
)
def test_the_order_of_preference(gpu: float, host: float, batch: int, expected: list[str] | None) -> None:
    asked = request(batch=batch, hot_set=4)
    assert find_changes(asked, limits_of(asked, gpu, host)) == expected


def test_files_instead_of_host_memory() -> None:
    asked = request()
    room = limits_of(asked)
    short = dataclasses.replace(room, host=room.host - 1)
    files = asked.of(kv_dir=".")
    assert disk_instead(asked, room) is None, "it fits"
    needed = disk_instead(asked, short)
    assert needed == files.plan(short.gpu).disk_kv == asked.plan(short.gpu).host_kv
    assert needed is not None and f"--kv-dir FOLDER with {memory_text(needed)} free" in kv_dir_hint(needed)
    assert limits_of(files).shortage(files.plan(short.gpu)) is None
    assert kv_dir_hint(disk_instead(files, short)) == "", "they are in files already"
    assert disk_instead(asked, dataclasses.replace(short, gpu=1)) is None, "the device is short, too"
    assert disk_instead(asked.of(kv_location="gpu"), short) is None


def test_a_dtype_that_is_left_open_has_as_many_bits_as_fit() -> None:
    asked = request(kv_dtype="auto", hot_set=None)
    limits = {name: limits_of(request(kv_dtype=name, hot_set=1)) for name in ("bf16", "int8", "int4")}
    for name, room in limits.items():
        settled = settle(asked, room)
        assert (settled.config.kv_dtype, fits(asked, room)) == (name, True)
        # A larger hot set comes after more bits.
        assert room.shortage(settled.plan(room.gpu)) is None
    short = dataclasses.replace(limits["int4"], host=limits["int4"].host - 1)
    assert settle(asked, short).config.kv_dtype == "int4" and not fits(asked, short)
    flags = find_changes(asked, short)
    assert flags is not None and flags[0].startswith("--ctx"), "fewer bits were tried already"
    # Room on the host does not help where the device has none.
    scarce = dataclasses.replace(limits_of(request(kv_dtype="int8", hot_set=4)), host=limits["bf16"].host)
    assert settle(asked.of(hot_set=4), scarce).config.kv_dtype == "int8"
    assert find_changes(request(kv_dtype="int8", hot_set=1), limits["int4"]) == ["--kv-dtype int4"]


def test_changes_are_combined_where_none_alone_is_enough() -> None:
    asked = request("llama-2-7b", batch=2)
    limits = limits_of(asked, 0.45, 0.2)
    flags = find_changes(asked, limits)
    assert flags is not None and len(flags) > 1
    assert len({flag.split()[0] for flag in flags}) == len(flags)
    assert fits(applied(asked, flags), limits)


def test_what_is_not_needed_beside_the_others_is_left_out() -> None:
    """Where only the host is short, less on the device is of no use, however short the context becomes."""
    asked = request("llama-2-7b", kv_dtype="int4")
    (flag,) = find_changes(asked, limits_of(asked, host=0.3)) or [""]
    assert flag.startswith("--ctx ")


def test_prompts_that_are_there_stay() -> None:
    """A run may have a smaller answer, never a shorter prompt or fewer sequences."""
    whole = request(kv_dtype="int4")
    run = dataclasses.replace(whole, prompts=(100_000,), most=(101_000,))
    flags = find_changes(run, limits_of(run, host=0.9999))
    assert flags == ["--ctx 98k"]
    assert applied(run, flags).capacities == [98 * 1024]
    assert find_changes(run, limits_of(run, host=0.9)) is None


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("budget", ["1/16", 4096, "top-p:0.9"])
def test_the_longest_context_fits_and_one_token_more_does_not(model: str, budget: str | int) -> None:
    asked = request(model, token_budget=budget)
    limits = limits_of(asked, 0.98, 3)
    longest = longest_context(asked, limits)
    assert 0 < longest < LONGEST
    assert fits(asked.of(max_context=longest), limits)
    assert not fits(asked.of(max_context=longest + 1), limits)


def test_no_context_fits_beside_weights_that_do_not() -> None:
    asked = request()
    assert longest_context(asked, limits_of(asked, 0.1)) == 0


def test_a_sliding_window_bounds_the_longest_context() -> None:
    source = find_source("mistral-7b", "auto", "auto", None)
    source.config.sliding_window = 4096
    asked = resolve_request(source, OffloadConfig(max_context=1024), 1, True)
    assert longest_context(asked, MemoryLimits(1 << 50, 1 << 50)) == 4096


def test_a_disk_that_is_short_leaves_the_hot_set_as_large_as_the_device_holds() -> None:
    asked = request(hot_set=None, kv_dir=".")
    room = dataclasses.replace(limits_of(asked.of(hot_set=2)), disk=1 << 50)
    assert settle(asked, room).config.hot_set == settle(asked, dataclasses.replace(room, disk=1)).config.hot_set
    assert settle(asked, room).config.hot_set > HOT_SETS[-1]


def test_contexts_are_written_in_thousands_where_they_are_whole_ones() -> None:
    assert _flags({"max_context": 2048}) == ["--ctx 2k"]
    assert _flags({"max_context": 1500, "hot_set": 1.0}) == ["--ctx 1500", "--hot-set 1"]
