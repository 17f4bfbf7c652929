"""The figures of a run: what they are called, what they count and what they leave out."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from generator_case import NEW, make
from tiny_models import random_prompts
from torch import Tensor

from ds_offload.decode import DecodeLoop
from ds_offload.prefetch.link_timer import LinkTime, LinkTimer


def test_the_hot_sets_size_changes_what_is_moved_and_nothing_else(tiny_llama: Path) -> None:
    prompt = random_prompts(200)[0]
    outs = []
    for hot_set in (1, 4):
        with make(tiny_llama, token_budget=24, hot_set=hot_set) as gen:
            outs.append(gen.generate(prompt, max_new_tokens=NEW, output_logits=True))
    assert torch.equal(outs[0].logits, outs[1].logits)
    assert outs[1].stats["h2d_bytes_per_token"] < outs[0].stats["h2d_bytes_per_token"]
    assert outs[1].stats["hot_set_hit_rate"] > outs[0].stats["hot_set_hit_rate"]


@pytest.mark.parametrize(("new", "slow"), [(7, False), (3, True)])
def test_the_first_two_steps_do_not_count_where_there_are_others(
    tiny_llama: Path, new: int, slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, steps = DecodeLoop.step, []

    def compiling(self: DecodeLoop, *given: Any) -> Tensor:
        steps.append(given)
        if len(steps) <= 2:
            time.sleep(0.5)
        return step(self, *given)

    monkeypatch.setattr(DecodeLoop, "step", compiling)
    with make(tiny_llama, token_budget=24) as gen:
        stats = gen.generate(random_prompts(100)[0], max_new_tokens=new).stats
    assert len(steps) == new - 1 and stats["first_steps_s"] >= 1
    assert (stats["decode_ms_per_token"] > 400) is slow


def test_waiting_is_that_of_the_steps_that_are_timed(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Nanoseconds of each of three layers: behind the second step, and at the end.
    waited = iter(([7_000_000_000] * 3, [7_002_000_000] * 3))
    monkeypatch.setattr(LinkTimer, "total", lambda timer: LinkTime([10**9] * 3, next(waited)))
    with make(tiny_llama, token_budget=24) as gen:
        stats = gen.generate(random_prompts(100)[0], max_new_tokens=5).stats
    assert stats["stall_ms_per_token"] == 3.0
    assert stats["layers"]["stall_ms_per_token"] == [1.0] * 3


def test_stats_have_the_contracts_names(tiny_llama: Path) -> None:
    with make(tiny_llama, token_budget=24) as gen:
        stats = gen.generate(random_prompts(100)[0], max_new_tokens=NEW).stats
    assert stats["prefill_s"] > 0 and stats["decode_ms_per_token"] > 0
    assert 0 < stats["prefetch_recall"] <= 1 and 0 <= stats["hot_set_hit_rate"] <= 1
    # Three layers, two KV heads: at most 19 selected rows each.
    row = 2 * 16 * 4
    assert 0 < stats["h2d_bytes_per_token"] <= 3 * 2 * 19 * row
    layers = stats["layers"]
    assert sum(layers["h2d_bytes_per_token"]) == pytest.approx(stats["h2d_bytes_per_token"], abs=1)
    assert sum(layers["hot_set_hit_rate"]) / 3 == pytest.approx(stats["hot_set_hit_rate"])
    # There is no link on a CPU.
    assert stats["link_gb_per_s"] is None and layers["stall_ms_per_token"] == [None] * 3
    assert stats["gpu_peak_bytes"] == 0 and stats["host_pinned_bytes"] == 0
    assert stats["host_kv_bytes"] == 3 * 2 * 1024 * row
