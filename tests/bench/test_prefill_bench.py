"""Prefills timed: operations counted by hand, rates above zero, and the rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny, tiny_config

from ds_offload import OffloadConfig
from ds_offload.bench.prefill import PrefillSizes, Rates, bench_prefill, least_seconds, measure_rates
from ds_offload.errors import InputError
from ds_offload.loading import find_model, load_weights

CPU = torch.device("cpu")


def test_operations_are_counted_as_by_hand(tmp_path: Path) -> None:
    save_tiny(tmp_path, tiny_config("llama", 2))
    loaded = load_weights(find_model(str(tmp_path)), CPU)
    # Three layers: q, k, v, o of 64 channels with 2 KV heads of 16, gate, up and down of 128.
    weights = 3 * (64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128)
    pairs = 3 * 4 * 100 * 101 / 2
    assert least_seconds(loaded, 100, Rates(1.0, 2.0)) == pytest.approx(2 * weights * 100 + 4 * pairs * 16 / 2)


def test_of_a_mixture_only_the_chosen_experts_count(tmp_path: Path) -> None:
    save_tiny(tmp_path, tiny_config("mixtral", 2))
    loaded = load_weights(find_model(str(tmp_path)), CPU)
    # Two of four experts, and the router.
    weights = 3 * (64 * 64 + 2 * 64 * 32 + 64 * 64 + 2 * 3 * 64 * 128 + 4 * 64)
    assert least_seconds(loaded, 1, Rates(1.0, float("inf"))) == pytest.approx(2 * weights)


def test_prefills_are_timed_against_what_their_operations_take() -> None:
    sizes = PrefillSizes("smollm2-135m", "fp32", tokens=128, repeats=2, with_transformers=True)
    rows, notes, config = bench_prefill(CPU, sizes, OffloadConfig())
    assert [row.name for row in rows] == ["prefill, warm", "prefill, nothing leaves for the store", "transformers"]
    assert notes == ["a cold prefill was left out: without a GPU no memory is page-locked"]
    assert config.max_context == 129
    assert rows[0].extra["over_nothing_leaving"] == rows[0].median / rows[1].median
    for row in rows:
        assert 0 < row.p20 <= row.median <= row.p80 and row.unit == "s"
        assert row.ratio is not None and row.ratio > 0.3
        assert row.extra["tokens_per_s"] == pytest.approx(128 / row.median)


def test_rates_are_those_of_a_computer(tmp_path: Path) -> None:
    save_tiny(tmp_path, tiny_config("llama"))
    rates = measure_rates(load_weights(find_model(str(tmp_path)), CPU))
    assert 1e8 < rates.linear < 1e14 and 1e8 < rates.attention < 1e14


def test_what_does_not_fit_is_refused_before_weights_load() -> None:
    sizes = PrefillSizes("llama-2-7b", "bf16", tokens=4096, repeats=1, with_transformers=False)
    with pytest.raises(InputError, match="memory"):
        bench_prefill(CPU, sizes, OffloadConfig(host_memory="1GiB"))
