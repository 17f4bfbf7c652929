"""The runtime on CUDA: transformers' tokens, the plan's bytes, pinned memory that goes back."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import greedy, random_prompts, save_tiny, tiny_config

from ds_offload import OffloadConfig, OffloadedGenerator
from ds_offload.errors import MemoryPlanError

pytestmark = pytest.mark.gpu

NEW = 16


def make(folder: Path | str, load_format: str = "auto", **changes: Any) -> OffloadedGenerator:
    config = OffloadConfig(**({"max_context": 4096, "sink_tokens": 2, "recent_tokens": 4} | changes))
    return OffloadedGenerator.from_pretrained(str(folder), config=config, device="cuda", load_format=load_format)


@pytest.mark.parametrize(
    ("family", "kv_heads"), [("llama", 4), ("llama", 2), ("llama", 1), ("mixtral", 2), ("qwen2", 2), ("qwen3", 2)]
)
def test_a_budget_of_the_whole_context_equals_transformers(family: str, kv_heads: int, tmp_path: Path) -> None:
    model = save_tiny(tmp_path, tiny_config(family, kv_heads)).cuda()
    prompts = random_prompts(150, 37, 201)
    with make(tmp_path, token_budget="1/1", segment_tokens=64) as gen:
        outs = gen.generate(prompts, max_new_tokens=NEW, output_logits=True)
    for out, prompt in zip(outs, prompts, strict=True):
        tokens, expected = greedy(model, prompt, NEW)
        assert out.token_ids == tokens
        torch.testing.assert_close(out.logits, expected.cpu(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kv_dtype", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_exact_off_and_gpu_give_the_same_256_tokens(kv_heads: int, kv_dtype: str, tmp_path: Path) -> None:
    save_tiny(tmp_path, tiny_config("llama", kv_heads), torch.bfloat16)
    prompts = random_prompts(600, 300)
    answers = {}
    for prefetch, location in (("exact", "host"), ("off", "host"), ("exact", "gpu")):
        changes = {"prefetch": prefetch, "kv_location": location, "hot_set": 1.5, "token_budget": "1/8"}
        changes["kv_dtype"] = kv_dtype
        with make(tmp_path, segment_tokens=64, **changes) as gen:
            outs = gen.generate(prompts, max_new_tokens=256)
        answers[prefetch, location] = [out.token_ids for out in outs]
        assert outs[0].stats["graph_capture_s"] > 0
        if location == "host":
            assert 0 < outs[0].stats["hot_set_hit_rate"] < 1 and outs[0].stats["link_gb_per_s"] > 0
    assert answers["exact", "host"] == answers["off", "host"] == answers["exact", "gpu"]
    assert len(set(answers["off", "host"][0])) > 20, "the answer is not one token over and over"


@pytest.mark.parametrize(
    "changes",
    [
        {"dense_layers": (1,)},
        {"token_budget": "top-p:0.8"},
        {"kv_dtype": "bf16"},
        {"hot_set": 0},
        {"kv_location": "gpu", "dense_layers": (0,)},
        {"label_bits": 16, "label_channels": 5},
        {"prefetch": "speculative"},
        {"kv_dtype": "int8"},
        {"kv_dtype": "int4", "kv_location": "gpu", "dense_layers": (0,)},
    ],
)
def test_every_setting_gives_what_the_cpu_gives(changes: dict[str, Any], tmp_path: Path) -> None:
    save_tiny(tmp_path, tiny_config("llama", 2))
    prompts = random_prompts(150, 61)
    common = {"max_context": 1024, "sink_tokens": 2, "recent_tokens": 4, "token_budget": "1/4", "segment_tokens": 64}
    logits = {}
    for device in ("cpu", "cuda"):
        config = OffloadConfig(**(common | changes))
        with OffloadedGenerator.from_pretrained(str(tmp_path), config=config, device=device) as gen:
            outs = gen.generate(prompts, max_new_tokens=6, output_logits=True)
        logits[device] = [out.logits for out in outs]
    for ours, theirs in zip(logits["cuda"], logits["cpu"], strict=True):
        # The first is the prompt's. Later ones follow a selection, which rounding may change for a tie.
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(ours[:3], theirs[:3], rtol=2e-2, atol=5e-2)


@pytest.mark.parametrize("sequences", [3, 17])
def test_a_batch_gives_each_sequence_the_tokens_it_gets_alone(sequences: int, tmp_path: Path) -> None:
    save_tiny(tmp_path, tiny_config("llama", 2))
    prompts = random_prompts(*range(40, 40 + 7 * sequences, 7))
    with make(tmp_path, token_budget="1/2", segment_tokens=64) as gen:
        together = gen.generate(prompts, max_new_tokens=8)
        for out, prompt in list(zip(together, prompts, strict=True))[::8]:
            assert gen.generate(prompt, max_new_tokens=8).token_ids == out.token_ids


def test_a_long_prompt_takes_memory_as_planned_and_gives_all_of_it_back(tmp_path: Path) -> None:
    config = tiny_config(
        "llama", hidden_size=512, intermediate_size=1024, num_attention_heads=8, num_hidden_layers=6, head_dim=64
    )
    save_tiny(tmp_path, config, torch.bfloat16)
    prompt = random_prompts(30_000)[0]
    with make(tmp_path, max_context=40_000) as gen:
        # Products of every size have had their workspace.
        gen.generate(prompt, max_new_tokens=4)
        # What earlier tests left must not go meanwhile.
        gc.collect()
        before = torch.cuda.memory_allocated()
        # Workspaces of the libraries, and what earlier tests left: the plan has them in its reserve.
        others = before - sum(parameter.nbytes for parameter in gen.loaded.model.parameters())
        stats = gen.generate(prompt, max_new_tokens=4).stats
        assert stats["host_pinned_bytes"] >= 6 * 2 * 30_000 * 2 * 64 * 2
        assert stats["gpu_peak_bytes"] - others == pytest.approx(stats["gpu_planned_bytes"], rel=0.1)
        assert torch.cuda.memory_allocated() == before
        with pytest.raises(MemoryPlanError, match="GPU memory"):
            gen.config = type(gen.config)(**(gen.config.to_dict() | {"gpu_memory": "64MiB"}))
            gen.generate(prompt, max_new_tokens=4)


def test_dummy_weights_run_on_the_device() -> None:
    with make("smollm2-135m", "dummy", max_context=2048) as gen:
        out = gen.generate("A prompt of bytes. " * 40, max_new_tokens=8)
        assert len(out.token_ids) == 8 and out.prompt_tokens == 760
        assert next(gen.loaded.model.parameters()).device.type == "cuda"
