"""Percentiles, what a sample is, and the limits' arithmetic."""

from __future__ import annotations

import time

import pytest
import torch

from ds_offload.bench.limits import Limits, measure_limits
from ds_offload.bench.timing import Stopwatch, Timing, percentile

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("samples", "share", "expected"),
    [
        ([3.0], 0.8, 3.0),
        ([1.0, 2.0], 0.5, 1.5),
        ([5.0, 1.0, 3.0], 0.5, 3.0),
        ([5.0, 1.0, 3.0], 0.0, 1.0),
        ([5.0, 1.0, 3.0], 1.0, 5.0),
        ([float(n) for n in range(11)], 0.2, 2.0),
        ([float(n) for n in reversed(range(11))], 0.8, 8.0),
        ([0.0, 10.0], 0.2, 2.0),
    ],
)
def test_percentiles_interpolate_between_sorted_samples(samples: list[float], share: float, expected: float) -> None:
    assert percentile(samples, share) == pytest.approx(expected)


def test_percentiles_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        percentile([], 0.5)


def test_a_timing_has_the_three_percentiles() -> None:
    assert Timing.of([4.0, 0.0, 1.0, 3.0, 2.0]) == Timing(median=2.0, p20=pytest.approx(0.8), p80=pytest.approx(3.2))


def test_a_time_is_that_of_one_call_and_warm_ups_do_not_count() -> None:
    calls = []

    def slow() -> None:
        # The first calls compile, as it were.
        time.sleep(0.1 if len(calls) < 2 else 0.01)
        calls.append(1)

    timing = Stopwatch(CPU, samples=3).time([slow, slow])
    assert len(calls) == 2 * (3 + 3)
    assert 0.01 <= timing.p20 <= timing.median <= timing.p80 < 0.05


def test_limits_are_bytes_over_bandwidth() -> None:
    limits = Limits(link=4.0, read=10.0, copy=20.0)
    assert limits.link_s(8) == 2.0
    assert limits.memory_s(60) == 3.0
    assert Limits(link=4.0, read=30.0, copy=20.0).memory_s(60) == 2.0
    assert limits.to_dict() == {"link_bytes_per_s": 4.0, "read_bytes_per_s": 10.0, "copy_bytes_per_s": 20.0}


def test_limits_are_measured_once() -> None:
    limits = measure_limits(CPU)
    assert measure_limits(torch.device("cpu")) is limits
    assert limits.copy == 2 * limits.link
    assert 1e8 < limits.link < 1e13 and 1e8 < limits.read < 1e13


@pytest.mark.gpu
def test_a_copy_on_the_device_takes_what_its_bandwidth_allows() -> None:
    """Captured and eager, one call or several that take turns: the same work, the same time."""
    device = torch.device("cuda")
    limits = measure_limits(device)
    assert limits.link < limits.read and limits.link < limits.copy
    source = torch.ones(4, 1 << 26, device=device)
    target = torch.empty_like(source)
    watch = Stopwatch(device, samples=10)
    expected = 2 * source[0].nbytes / limits.copy
    calls = [lambda n=n: target[n].copy_(source[n]) for n in range(4)]
    for timing in (watch.time(calls[:1]), watch.time(calls), watch.time(calls, capture=False)):
        assert timing.median == pytest.approx(expected, rel=0.2)


@pytest.mark.gpu
def test_the_level_2_cache_holds_nothing_of_what_is_timed() -> None:
    device = torch.device("cuda")
    nbytes = torch.cuda.get_device_properties(device).L2_cache_size // 4
    source = torch.ones(nbytes // 4, device=device)
    flushed = Stopwatch(device, samples=20).time([source.amax])
    warm = Stopwatch(device, samples=20).time([source.amax] * 16)
    assert warm.median < flushed.median
