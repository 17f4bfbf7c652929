"""The line of figures."""

from __future__ import annotations

import pytest

from ds_offload.cli.figures import bytes_text, figures_line, monitor_line
from ds_offload.generation import GenerationOutput


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (3 * 2**20 / 2, "1.5 MiB"),
        (24 * 2**30, "24.0 GiB"),
        (3 * 2**50, "3072.0 TiB"),
    ],
)
def test_bytes_text(count: float, text: str) -> None:
    assert bytes_text(count) == text


def test_everything_measured() -> None:
    stats = {
        "prefill_s": 2.0,
        "decode_ms_per_token": 83.26,
        "h2d_bytes_per_token": 2**20,
        "hot_set_hit_rate": 0.914,
        "prefetch_recall": 0.5,
        "stall_ms_per_token": 1.26,
        "gpu_peak_bytes": 2**31,
        "host_kv_bytes": 2**30,
    }
    output = GenerationOutput("text", [1] * 1200, 5000, "length", stats)
    assert figures_line(output) == (
        "prompt 5,000 tokens in 2.00 s (2,500 tokens/s); 1,200 new tokens at 83.3 ms/token, cut at the limit; "
        "1.0 MiB/token from the host; hot set hits 91 %; "
        "waiting for rows 1.3 ms/token; GPU peak 2.0 GiB; KV cache on the host 1.0 GiB"
    )


def test_what_was_not_measured_is_left_out() -> None:
    stats = {
        "prefill_s": 0.0,
        "decode_ms_per_token": None,
        "h2d_bytes_per_token": 0,
        "hot_set_hit_rate": None,
        "gpu_peak_bytes": 0,
        "host_kv_bytes": 0,
    }
    output = GenerationOutput("text", [1], 5, "stop", stats)
    assert figures_line(output) == "prompt 5 tokens in 0.00 s; 1 new tokens; 0 B/token from the host"


def test_what_the_monitor_saw() -> None:
    monitor = {
        "attention_mass": 0.8191,
        "best_mass": 0.873,
        "output_error": 0.176,
        "selection_recall": 0.5214,
        "comparisons": 5,
        "seconds": 0.2,
        "layers": {"attention_mass": [0.8, None, 0.84]},
    }
    assert monitor_line(monitor) == (
        "monitor: attention mass 0.819 (at most 0.873 with as many tokens); output error 0.176; "
        "recall of the selection 0.521; 5 comparisons of 2 layers in 0.20 s"
    )
    assert "recall" not in monitor_line(monitor | {"selection_recall": None})
