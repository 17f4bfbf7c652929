"""What B sequences keep: budgets that may be raised, and what is let go of at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from generator_case import make
from tiny_models import random_prompts

from ds_offload import OffloadedGenerator
from ds_offload.decode import DecodeLoop
from ds_offload.kv_context import KVContext
from ds_offload.prefill import prefill


def context_of(gen: OffloadedGenerator, capacities: list[int]) -> KVContext:
    gen.generate(random_prompts(20)[0], max_new_tokens=1)
    assert gen._calibration is not None
    return KVContext(gen.decoder, gen.config, gen._calibration, capacities)


def test_slots_are_there_for_the_widest_budget(tiny_llama: Path) -> None:
    with make(tiny_llama, token_budget=24, monitor="widen") as gen, context_of(gen, [200, 40]) as context:
        # Of the budget, two sinks, four recent tokens and the current one.
        assert context.most_kept == 48 - 7
        kept = [context.keep([200, 40])]
        before = context.budget_state
        for wider in (True, True, False):
            assert context.widen() == wider
            kept.append(context.keep([200, 40]))
        assert kept == [[17, 17], [29, 29], [41, 33], [41, 33]]
        assert context.token_budget == "48" and context.kept_tokens(200) == 48
        context.budget_state = before
        assert context.token_budget == "24" and context.widen() and context.token_budget == "36"


@torch.no_grad()
def test_a_closed_context_lets_go_of_what_attention_left(tiny_llama: Path) -> None:
    with make(tiny_llama, token_budget=24, dense_layers=(1,)) as gen:
        prompt = random_prompts(60)[0]
        with context_of(gen, [64]) as context:
            prefill(gen.decoder, context, 0, prompt)
            DecodeLoop(gen.decoder, context).step([5], [61])
            shapes: dict[int, Any] = {layer: tuple(kept.output.shape) for layer, kept in context.attended.items()}
            heads = gen.decoder.heads, gen.decoder.head_dim
            assert shapes == {0: (1, *heads), 2: (1, *heads)}
        assert not context.attended


@pytest.mark.parametrize(
    ("changes", "reuse", "everything"),
    [({"hot_set": 0}, False, False), ({"hot_set": 1}, True, False), ({"token_budget": "1/1"}, True, True)],
)
def test_what_the_settings_come_to(changes: dict[str, Any], reuse: bool, everything: bool, tiny_llama: Path) -> None:
    with make(tiny_llama, **{"token_budget": 24} | changes) as gen, context_of(gen, [200]) as context:
        assert context.hot_set is not None and context.hot_set.reuse == reuse
        assert context.scheduler.selector.everything == everything


def test_dense_layers_of_unequal_sequences_attend_to_their_own_tokens_alone(tiny_llama: Path) -> None:
    prompts = random_prompts(90, 30)
    with make(tiny_llama, token_budget="1/1", dense_layers=(0, 1, 2)) as gen:
        both = gen.generate(prompts, max_new_tokens=4, output_logits=True)
        for out, prompt in zip(both, prompts, strict=True):
            alone = gen.generate(prompt, max_new_tokens=4, output_logits=True)
            torch.testing.assert_close(out.logits, alone.logits, rtol=1e-4, atol=1e-5)
