"""Estimates against sums written out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from ds_offload.config import OffloadConfig
from ds_offload.planning.estimate import (
    AHEAD,
    GROUPED_READINGS,
    IN_LINE,
    LAYER_OVERHEAD_S,
    LONG_SELECTION_S,
    Rates,
    estimate,
    far_rows_per_s,
    hit_rate,
    prefill_flops,
)
from ds_offload.planning.report import find_source, resolve_request
from ds_offload.planning.request import Request

RATES = Rates(50.0, 3000.0, 900.0, "a test", "a test")
T = 1 << 16


def request(model: str = "llama-2-7b", batch: int = 1, dtype: str = "auto", **config: Any) -> Request:
    source = find_source(model, "auto", dtype, None)
    return resolve_request(
        source, OffloadConfig(**{"max_context": T, "hot_set": 2, "prefetch": "exact"} | config), batch, True
    )


@pytest.mark.parametrize(
    ("hot_set", "expected"), [(0, 0), (1.25, 0.86), (2, 0.94), (4, 0.98), (3, 0.96), (1.625, 0.9), (100, 1), (9, 0.98)]
)
def test_hit_rate(hot_set: float, expected: float) -> None:
    assert hit_rate(hot_set, request(hot_set=hot_set).shape()) == pytest.approx(expected)


@pytest.mark.parametrize("mode", ["exact", "off", "speculative"])
def test_a_step_of_llama_2_7b(mode: str) -> None:
    # 32 layers, 32 heads of 128 channels; 69 window tokens and 1/16 of all others; labels of 16 bytes.
    asked = request(prefetch=mode)
    got = estimate(asked, RATES)
    missing = 32 * 32 * (T // 16 - 69) * 512 * 0.06
    in_line, ahead = {"exact": (IN_LINE, AHEAD), "off": (1, 0), "speculative": (0, 1)}[mode]
    assert got.h2d_bytes_per_token == pytest.approx(missing * (in_line + ahead), abs=1)
    parameters = asked.source.shape.parameters - 32000 * 4096
    read = 2 * parameters + 32 * 32 * (T // 16) * 512 + 32 * 32 * T * 16
    # Several hundred rows of 512 bytes a head are bound by the 50 GB/s of the link.
    far = 50e9 / 512
    assert far_rows_per_s((1 - got.assumptions["hot_set_hit_rate"]) * (T // 16 - 69)) > far
    waiting = missing * in_line / 512 / far
    seconds = read / 3e12 + waiting + 32 * (LAYER_OVERHEAD_S + LONG_SELECTION_S * 32 * T)
    seconds = max(seconds, missing * (in_line + ahead) / 512 / far)
    assert got.decode_ms_per_token == pytest.approx(1000 * seconds)
    work = 2 * (parameters - 32000 * 4096) * T + 2 * T**2 * 4096 * 32
    assert prefill_flops(asked.source, T) == work
    assert got.prefill_s == pytest.approx(work / (0.6 * 900e12))
    assert got.assumptions["rows_ahead_per_miss"] == pytest.approx(ahead, abs=1e-3)


@pytest.mark.parametrize(
    ("managed", "missing", "expected"),
    [
        (False, 0, 29e6),
        (False, 121, 29e6),
        (False, 1000, 60e6),
        (False, 348, 41.7e6),
        (False, 9000, 95e6),
        (True, 121, 80e6),
        (True, 348, 129.6e6),
        (True, 9000, 210e6),
    ],
)
def test_fewer_far_rows_arrive_more_slowly(managed: bool, missing: float, expected: float) -> None:
    assert far_rows_per_s(missing, managed) == pytest.approx(expected, rel=1e-2)


def test_rows_that_are_page_locked_are_waited_for_longer() -> None:
    managed, locked = (
        estimate(request(prefetch="off", hot_set=4), replace(RATES, managed=managed)) for managed in (True, False)
    )
    assert managed.decode_ms_per_token is not None and locked.decode_ms_per_token is not None
    assert locked.decode_ms_per_token > managed.decode_ms_per_token + 1
    assert locked.h2d_bytes_per_token == managed.h2d_bytes_per_token


def test_a_slow_link_is_what_a_step_waits_for() -> None:
    got = estimate(request(prefetch="speculative"), Rates(1.0, 3000.0, 900.0, "a test", "a test"))
    assert got.decode_ms_per_token == pytest.approx(got.h2d_bytes_per_token / 1e6)


def test_grouped_scores_take_several_readings_of_the_labels() -> None:
    times = [
        estimate(request("llama-3.1-8b", prefetch="off", label_channels=n), RATES).decode_ms_per_token
        for n in (60, 124)
    ]
    assert None not in times
    # 16 bytes more of 8 KV heads and 32 layers.
    assert times[1] - times[0] == pytest.approx(1000 * GROUPED_READINGS * 16 * 8 * 32 * T / 3e12, rel=1e-6)  # type: ignore[operator]


H100, H200 = (Rates(54.5, read, 900.0, "docs/benchmarks.md", None) for read in (2950.0, 4150.0))


@pytest.mark.parametrize(
    ("rates", "model", "batch", "config", "measured"),
    [
        (H100, "llama-2-7b", 1, {"max_context": 131_072}, 12.7),
        (H100, "llama-3.1-8b", 1, {"max_context": 524_000, "token_budget": 2048}, 11.35),
        (H200, "llama-2-7b", 1, {"max_context": 131_072}, 9.85),
        (H200, "llama-2-7b", 1, {"max_context": 16_384}, 6.43),
        (H200, "llama-3.1-8b", 1, {"max_context": 524_000, "token_budget": 2048}, 9.49),
        (H200, "llama-3.1-8b", 1, {"max_context": 32_768}, 6.78),
        (H200, "llama-3.1-8b", 8, {"max_context": 32_768}, 9.82),
        (H200, "llama-3.1-8b", 1, {"max_context": 1_000_000, "token_budget": 2048, "kv_dtype": "int4"}, 12.5),
        (H200, "llama-2-7b", 1, {"max_context": 262_144, "kv_dtype": "int4", "hot_set": 2}, 15.9),
        (H200, "llama-2-7b", 1, {"max_context": 262_144, "kv_dtype": "int8"}, 14.0),
    ],
)
def test_estimates_are_near_what_was_measured(
    rates: Rates, model: str, batch: int, config: dict[str, Any], measured: float
) -> None:
    """Of docs/benchmarks.md, at the bandwidths measured there."""
    got = estimate(request(model, batch, prefetch="off", **{"hot_set": 4, **config}), rates)
    assert got.decode_ms_per_token == pytest.approx(measured, rel=0.1)


def test_without_a_hot_set_rows_come_at_the_speed_of_the_link() -> None:
    got = estimate(request(hot_set=0, prefetch="off"), Rates(50.0, 1e9, 900.0, "a test", None))
    moving = got.h2d_bytes_per_token / 50e9 + 32 * (LAYER_OVERHEAD_S + LONG_SELECTION_S * 32 * T)
    assert got.decode_ms_per_token == pytest.approx(1000 * moving, rel=1e-3)


def test_a_store_on_the_device_moves_nothing() -> None:
    got = estimate(request(kv_location="gpu"), RATES)
    assert got.h2d_bytes_per_token == 0
    assert got.assumptions["hot_set_hit_rate"] is None


def test_a_batch_reads_the_weights_once() -> None:
    one, four = (estimate(request(batch=n, prefetch="off"), RATES) for n in (1, 4))
    assert one.decode_ms_per_token is not None and four.decode_ms_per_token is not None
    assert one.h2d_bytes_per_token == four.h2d_bytes_per_token
    assert one.decode_ms_per_token < four.decode_ms_per_token < 4 * one.decode_ms_per_token
    assert four.prefill_s == pytest.approx(4 * (one.prefill_s or 0))


def test_experts_that_a_token_does_not_go_through_are_not_read() -> None:
    source = request("mixtral-8x7b").source
    layer = 3 * 4096 * 14336
    everything = 2 * (source.shape.parameters - 2 * 32000 * 4096)
    attention = 2 * 32 * 128 * 32
    assert prefill_flops(source, 1) == everything - 2 * 32 * 6 * layer + attention


def test_without_rates_there_are_no_times() -> None:
    got = estimate(request(), None)
    assert got.prefill_s is None and got.decode_ms_per_token is None
    assert got.h2d_bytes_per_token > 0 and got.assumptions["times"].startswith("none: ")


def test_no_rate_of_float32_products_is_made_up() -> None:
    got = estimate(request(dtype="fp32"), RATES)
    assert got.prefill_s is None and got.decode_ms_per_token is not None
    assert "float32" in got.assumptions["prefill"]
    unknown = estimate(request(), Rates(50.0, 3000.0, None, "a test", None))
    assert unknown.prefill_s is None and unknown.decode_ms_per_token is not None
