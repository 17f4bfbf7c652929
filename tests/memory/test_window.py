"""The window's arithmetic: every token is a sink, a candidate or recent, and exactly one of them."""

from __future__ import annotations

import pytest
import torch

from ds_offload.memory.window import AttentionWindow


@pytest.mark.parametrize("sinks", [0, 1, 4])
@pytest.mark.parametrize("recent", [0, 1, 6])
def test_forced_tokens_are_the_first_and_the_last(sinks: int, recent: int) -> None:
    window = AttentionWindow(sinks, recent)
    for length in range(1, 20):
        lengths = torch.tensor([length])
        first = [n for n in window.sink_tokens(lengths)[0].tolist() if n >= 0]
        last = [n for n in window.recent_tokens(lengths)[0].tolist() if n >= 0]
        assert first == list(range(min(sinks, length)))
        assert last == list(range(max(sinks, length - recent - 1), length))
        assert len(first) + len(last) == window.forced(length)
        assert length - 1 in first + last


def test_the_budget_counts_forced_tokens() -> None:
    window = AttentionWindow(4, 64)
    assert window.selected(256, 2048) == 256 - 69
    assert window.selected(10, 2048) == 0
    assert window.selected(256, 100) == 100 - 69
    assert window.selected(256, 30) == 0
