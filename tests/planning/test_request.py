"""Many sequences in one request, and what to do where nothing makes one fit."""

from __future__ import annotations

import dataclasses

import pytest

from ds_offload.config import OffloadConfig, TokenBudget
from ds_offload.planning.report import find_source, resolve_request
from ds_offload.planning.request import MemoryLimits, Shortage, host_total


def test_sequences_of_one_length_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan looks at hundreds of requests: each sequence by itself took minutes with a batch of 100,000."""
    source = find_source("llama-2-7b", "auto", "auto", None)
    config = OffloadConfig(max_context="4k", hot_set=1, kv_dtype="bf16")
    one = resolve_request(source, config, 1, True).plan()
    seen: list[int] = []
    tokens = TokenBudget.tokens
    monkeypatch.setattr(TokenBudget, "tokens", lambda budget, length: seen.append(length) or tokens(budget, length))
    many = resolve_request(source, config, 10_000, True).plan()
    assert len(seen) < 10
    assert many.host_kv == 10_000 * one.host_kv


def test_the_last_resort_is_where_the_limit_comes_from() -> None:
    """A disk, a limit that was given, and memory that is not there."""
    given = OffloadConfig(host_memory=100, gpu_memory=200)
    assert Shortage("disk", 9, 1).last_resort(given).startswith("give kv_dir a folder on a disk with more room")
    assert Shortage("host memory", 101, 100).last_resort(given) == "raise host_memory, or choose a smaller model"
    assert Shortage("GPU memory", 201, 200).last_resort(given) == "raise gpu_memory, or choose a smaller model"
    assert Shortage("host memory", 101, 99).last_resort(given) == "choose a smaller model"
    assert Shortage("host memory", 101, 100).last_resort(OffloadConfig()) == "choose a smaller model"


def test_what_takes_all_there_is_fits_and_a_byte_more_does_not() -> None:
    asked = resolve_request(find_source("llama-2-7b", "auto", "auto", None), OffloadConfig(kv_dir="."), 1, True)
    plan = asked.plan()
    host = host_total(plan, True)
    exact = MemoryLimits(plan.gpu_total, host, plan.disk_kv)
    assert exact.shortage(plan) is None
    short = [dataclasses.replace(exact, **{name: getattr(exact, name) - 1}) for name in ("gpu", "host", "disk")]
    found = [limits.shortage(plan) for limits in short]
    assert [one.place for one in found if one is not None] == ["GPU memory", "host memory", "disk"]
