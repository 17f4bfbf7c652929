"""The runtime against transformers, its modes against each other, batches against single prompts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from generator_case import LENGTHS, NEW, make
from tiny_models import greedy, random_prompts, save_tiny, tiny_config

from ds_offload import InputError, OffloadedGenerator

FAMILIES = [
    ("llama", 4, {}),
    ("llama", 2, {}),
    ("llama", 1, {}),
    ("llama", 2, {"hidden_size": 96, "num_attention_heads": 6, "head_dim": 24}),
    ("llama", 2, {"rope_parameters": {"rope_type": "linear", "factor": 4.0}}),
    ("llama", 2, {"max_position_embeddings": 64, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}),
    (
        "llama",
        2,
        {
            "max_position_embeddings": 256,
            "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        },
    ),
    (
        "llama",
        2,
        {
            "max_position_embeddings": 256,
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    ("mistral", 2, {}),
    ("mixtral", 2, {}),
    ("qwen2", 2, {}),
    ("qwen3", 2, {}),
]


@pytest.mark.parametrize(("family", "kv_heads", "changes"), FAMILIES)
def test_a_budget_of_the_whole_context_equals_transformers(
    family: str, kv_heads: int, changes: dict[str, Any], tmp_path: Path
) -> None:
    if "rope_parameters" in changes:
        changes = changes | {"rope_parameters": {"rope_theta": 10000.0} | changes["rope_parameters"]}
    model = save_tiny(tmp_path, tiny_config(family, kv_heads, **changes))
    prompts = random_prompts(*LENGTHS)
    expected = [greedy(model, prompt, NEW) for prompt in prompts]
    with make(tmp_path, token_budget="1/1") as gen:
        batch = gen.generate(prompts, max_new_tokens=NEW, output_logits=True)
        single = gen.generate(prompts[1], max_new_tokens=NEW, output_logits=True)
    for out, (tokens, logits) in zip([*batch, single], [*expected, expected[1]], strict=True):
        assert out.token_ids == tokens
        assert out.finish_reason == "length"
        torch.testing.assert_close(out.logits, logits, rtol=1e-4, atol=1e-4)


def test_bf16_logits_are_within_the_dtypes_tolerance_of_transformers(tmp_path: Path) -> None:
    model = save_tiny(tmp_path, tiny_config("llama", initializer_range=0.05), torch.bfloat16)
    prompt = random_prompts(120)[0]
    logits = greedy(model, prompt, 1)[1]
    with make(tmp_path, token_budget="1/1") as gen:
        out = gen.generate(prompt, max_new_tokens=1, output_logits=True)
        assert gen.config.kv_dtype == "bf16"
    assert (out.logits - logits).norm() / logits.norm() < 2e-2


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("budget", [1, 7, 24, "1/4", "1/1"])
def test_exact_off_and_gpu_give_identical_tokens(kv_heads: int, budget: int | str, tmp_path: Path) -> None:
    save_tiny(tmp_path, tiny_config("llama", kv_heads))
    prompts = random_prompts(*LENGTHS)
    results = {}
    for prefetch in ("exact", "off"):
        for location in ("host", "gpu"):
            with make(tmp_path, token_budget=budget, prefetch=prefetch, kv_location=location, hot_set=1) as gen:
                outs = gen.generate(prompts, max_new_tokens=NEW, output_logits=True)
            results[prefetch, location] = torch.stack([out.logits for out in outs])
    for other in results.values():
        assert torch.equal(other, results["exact", "host"])


def test_speculative_differs_only_through_its_selection(tiny_llama: Path) -> None:
    prompts = random_prompts(*LENGTHS)
    logits = {}
    for location in ("host", "gpu"):
        with make(tiny_llama, token_budget=24, prefetch="speculative", kv_location=location) as gen:
            outs = gen.generate(prompts, max_new_tokens=NEW, output_logits=True)
        logits[location] = torch.stack([out.logits for out in outs])
    assert torch.equal(logits["host"], logits["gpu"])
    with (
        make(tiny_llama, token_budget="1/1", prefetch="speculative") as gen,
        make(tiny_llama, token_budget="1/1") as exact,
    ):
        for prompt in prompts:
            assert (
                gen.generate(prompt, max_new_tokens=NEW).token_ids
                == exact.generate(prompt, max_new_tokens=NEW).token_ids
            )


@pytest.mark.parametrize("prefetch", ["exact", "speculative", "off"])
def test_other_sequences_in_the_batch_change_nothing(tiny_llama: Path, prefetch: str) -> None:
    prompts = random_prompts(*LENGTHS)
    with make(tiny_llama, token_budget="1/8", prefetch=prefetch) as gen:
        together = gen.generate(prompts, max_new_tokens=NEW)
        alone = [gen.generate(prompt, max_new_tokens=NEW) for prompt in prompts]
    assert [out.token_ids for out in together] == [out.token_ids for out in alone]


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 100])
def test_where_segments_end_changes_nothing(tiny_llama: Path, length: int) -> None:
    prompt = random_prompts(length)[0]
    results = []
    for segment in (16, 1024):
        with make(tiny_llama, token_budget=9, segment_tokens=segment, sink_tokens=1, recent_tokens=1) as gen:
            results.append(gen.generate(prompt, max_new_tokens=NEW + 4, output_logits=True).logits)
    assert torch.equal(results[0], results[1])


def test_dense_layers_are_attended_in_full(tiny_llama: Path, tmp_path: Path) -> None:
    model = save_tiny(tmp_path, tiny_config("llama"))
    prompts = random_prompts(*LENGTHS)
    with make(tmp_path, token_budget=8, dense_layers=(0, 1, 2)) as gen:
        outs = gen.generate(prompts, max_new_tokens=NEW)
        assert outs[0].stats["mean_density"] == 1
    assert [out.token_ids for out in outs] == [greedy(model, prompt, NEW)[0] for prompt in prompts]
    with make(tiny_llama, token_budget=8, dense_layers=(1,)) as gen:
        mixed = gen.generate(prompts, max_new_tokens=NEW)
        assert [gen.generate(p, max_new_tokens=NEW).token_ids for p in prompts] == [out.token_ids for out in mixed]


def test_a_sequence_that_ends_early_does_not_change_the_others(tiny_llama: Path) -> None:
    prompts = random_prompts(*LENGTHS)
    with make(tiny_llama, token_budget=24) as gen:
        free = gen.generate(prompts, max_new_tokens=NEW)
        end = next(t for t in free[0].token_ids[2:] if t not in free[1].token_ids + free[2].token_ids)
        gen.loaded.eos_token_ids = frozenset([end])
        outs = gen.generate(prompts, max_new_tokens=NEW)
    cut = free[0].token_ids[: free[0].token_ids.index(end) + 1]
    assert (outs[0].token_ids, outs[0].finish_reason) == (cut, "stop")
    assert [out.token_ids for out in outs[1:]] == [out.token_ids for out in free[1:]]


def test_stream_gives_the_same_answer_in_pieces_and_frees_when_closed(tiny_llama: Path) -> None:
    prompt = random_prompts(50)[0]
    with make(tiny_llama) as gen:
        out = gen.generate(prompt, max_new_tokens=NEW)
        pieces = list(gen.stream(prompt, max_new_tokens=NEW))
        assert "".join(pieces) == out.text and len(pieces) > 1
        assert gen.last_output is not None and gen.last_output.token_ids == out.token_ids
        half = gen.stream(prompt, max_new_tokens=NEW)
        next(half)
        half.close()
        assert gen.generate(prompt, max_new_tokens=NEW).token_ids == out.token_ids


def test_seeded_sampling_does_not_depend_on_the_batch(tiny_llama: Path) -> None:
    prompts = random_prompts(*LENGTHS)
    with make(tiny_llama) as gen:
        how = {"max_new_tokens": NEW, "temperature": 0.9, "top_k": 50, "seed": 7}
        together = gen.generate(prompts, **how)
        assert [gen.generate(prompt, **how).token_ids for prompt in prompts] == [out.token_ids for out in together]
        assert together[0].token_ids != gen.generate(prompts[0], max_new_tokens=NEW).token_ids


def test_progress_is_reported(tiny_llama: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    with make(tiny_llama) as gen:
        gen.generate(random_prompts(20)[0], max_new_tokens=4, on_progress=lambda *event: seen.append(event))
    assert [event for event in seen if event[0] == "prefill"] == [("prefill", n, 20) for n in (0, 6, 13, 20)]
    assert [event for event in seen if event[0] == "decode"] == [("decode", n, 4) for n in (2, 3, 4)]


def test_the_answer_is_limited_by_the_context(tiny_llama: Path) -> None:
    with make(tiny_llama, max_context=30) as gen:
        assert len(gen.generate(random_prompts(25)[0], max_new_tokens=NEW).token_ids) == 5
        with pytest.raises(InputError, match="30 tokens and max_context=30"):
            gen.generate(random_prompts(30)[0])


@pytest.mark.parametrize("prompt", [[], "", [[]], [301], [-1], [[1, 2], []], None, [1.5], "text without tokenizer"])
def test_bad_prompts_are_refused_in_one_line(tiny_llama: Path, prompt: Any) -> None:
    with make(tiny_llama) as gen, pytest.raises(InputError) as error:
        gen.generate(prompt, max_new_tokens=2)
    assert "\n" not in str(error.value)


def test_a_request_beyond_host_memory_is_refused_before_anything_is_made(tiny_llama: Path) -> None:
    with make(tiny_llama) as gen:
        gen.config = dataclasses.replace(gen.config, host_memory="1MiB")
        with pytest.raises(InputError, match="host_memory"):
            gen.generate(random_prompts(500)[0], max_new_tokens=400)


def test_it_may_be_closed_twice(tiny_llama: Path) -> None:
    with OffloadedGenerator.from_pretrained(str(tiny_llama), device="cpu") as gen:
        gen.close()
    gen.close()


def test_a_config_of_another_type_is_refused(tiny_llama: Path) -> None:
    config: Any = {"max_context": 100}
    with pytest.raises(InputError, match=r"config=\{'max_context': 100\} is no OffloadConfig; give OffloadConfig"):
        OffloadedGenerator.from_pretrained(str(tiny_llama), config=config, device="cpu")
