"""Many sequences in one request."""

from __future__ import annotations

import pytest

from ds_offload.config import OffloadConfig, TokenBudget
from ds_offload.planning.report import find_source, resolve_request


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
