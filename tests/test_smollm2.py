"""The default model on a real document: transformers' own tokens, and less moved than the cache weighs."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import pytest
import torch
from tiny_models import greedy
from transformers import AutoModelForCausalLM

from ds_offload import OffloadConfig, OffloadedGenerator

PROMPT_TOKENS = 2100
NEW = 16


@pytest.fixture(scope="module")
def document() -> str:
    return files("ds_offload").joinpath("data", "jargon_file.txt").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_budget_of_the_whole_context_equals_transformers_at_2100_tokens(smollm2: Path, document: str) -> None:
    with OffloadedGenerator.from_pretrained(config=OffloadConfig(token_budget="1/1"), device="cpu") as gen:
        prompt = gen.tokenizer(document)["input_ids"][:PROMPT_TOKENS]
        out = gen.generate(prompt, max_new_tokens=NEW, output_logits=True)
    tokens, logits = greedy(AutoModelForCausalLM.from_pretrained(smollm2), prompt, NEW)
    assert out.token_ids == tokens
    torch.testing.assert_close(out.logits, logits, rtol=1e-3, atol=1e-2)


@pytest.mark.slow
def test_a_sixteenth_of_the_tokens_moves_far_less_than_the_cache(smollm2: Path, document: str) -> None:
    with OffloadedGenerator.from_pretrained(device="cpu") as gen:
        prompt = gen.tokenizer(document)["input_ids"][:PROMPT_TOKENS]
        stats = gen.generate(prompt, max_new_tokens=NEW).stats
    cache = 30 * 3 * PROMPT_TOKENS * 2 * 64 * 4
    # 132 tokens a head, 69 of them in the window: the other 63 are 3 % of the cache, and most stay from step to step.
    assert 0 < stats["h2d_bytes_per_token"] < 0.03 * cache
    assert stats["hot_set_hit_rate"] > 0.5
    assert stats["prefetch_recall"] > 0.5
    # Labels are a sixteenth of 16-bit keys, a 64th of these fp32 rows' keys and values together.
    assert stats["label_bytes"] * 64 == pytest.approx(cache, rel=0.01)
