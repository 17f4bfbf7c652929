"""A plan that says it fits: what a context allocates, what a run takes at most, and one byte less."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from planning.live_tensors import LiveTensors
from tiny_models import random_prompts, save_tiny, tiny_config

from ds_offload import OffloadConfig, OffloadedGenerator
from ds_offload.attention_fidelity import FidelitySums, compare_step
from ds_offload.decode import DecodeLoop
from ds_offload.errors import MemoryPlanError
from ds_offload.kv_context import KVContext
from ds_offload.memory.plan import CUDA_RESERVE_BYTES, plan_memory
from ds_offload.memory.workspace import hidden_state_bytes, streamed_prefill_bytes
from ds_offload.planning.request import Request, host_total
from ds_offload.prefill import prefill
from ds_offload.preparation import PreparedModel


@dataclass(frozen=True)
class Case:
    """A model's family, its KV heads of 4 query heads, prompts, new tokens, and fields of the config."""

    family: str
    kv_heads: int
    prompts: list[int]
    new: int = 3
    config: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, Any] = field(default_factory=dict)


CASES = {
    "one prompt": Case("llama", 2, [1500]),
    "one query head a KV head": Case("llama", 4, [900], config={"token_budget": "1/3", "hot_set": 1}),
    "one KV head, top-p": Case("llama", 1, [700, 20], config={"token_budget": "top-p:0.9"}),
    "top-p without groups": Case("llama", 4, [800], config={"token_budget": "top-p:0.5", "prefetch": "speculative"}),
    "experts": Case("mixtral", 2, [600, 300]),
    "head norms, bf16 rows": Case("qwen3", 2, [600], config={"kv_dtype": "bf16", "label_bits": 8}),
    "biases, 16-bit labels": Case("qwen2", 2, [300, 41, 77], config={"label_bits": 16, "segment_tokens": 7}),
    "dense layer": Case("llama", 2, [500, 90], config={"dense_layers": (1,), "kv_dtype": "bf16", "hot_set": 0}),
    "store on the device": Case("mistral", 2, [400], config={"kv_location": "gpu", "token_budget": "1/2"}),
    "every token": Case("llama", 2, [500], config={"token_budget": "1/1", "recent_tokens": 5, "sink_tokens": 0}),
    "long answers of short prompts": Case("llama", 1, [3] * 6, new=160, config={"token_budget": "1/2"}),
    "int8": Case("llama", 2, [1300, 70], config={"kv_dtype": "int8"}),
    "int4, store on the device": Case("llama", 4, [700], config={"kv_dtype": "int4", "kv_location": "gpu"}),
    "int4, every token": Case("llama", 1, [300, 90], config={"kv_dtype": "int4", "token_budget": "1/1"}),
    "int8, dense layer": Case("mistral", 2, [500], config={"kv_dtype": "int8", "dense_layers": (1,), "hot_set": 0}),
    "wide MLP, off": Case(
        "llama", 2, [700], config={"prefetch": "off", "label_bits": 4}, sizes={"intermediate_size": 1024}
    ),
}


def prepare(folder: Path, case: Case, **limits: int) -> PreparedModel:
    config = OffloadConfig(
        **{"max_context": 4096, "hot_set": 2, "prefetch": "exact", "kv_dtype": "fp32"} | case.config | limits
    )
    return PreparedModel.find(str(folder), config, "auto", "cpu", "auto", None)


@pytest.mark.parametrize("name", CASES)
def test_a_plan_that_says_it_fits_keeps_its_word(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    save_tiny(tmp_path, tiny_config(case.family, case.kv_heads, **case.sizes))
    capacities = [length + case.new for length in case.prompts]
    plan = prepare(tmp_path, case).check(case.prompts, capacities)
    total = host_total(plan, cuda=False)
    assert plan.reserve == 0
    assert total == plan.gpu_tensors + plan.host_kv
    with pytest.raises(MemoryPlanError, match="of host memory and"):
        prepare(tmp_path, case, host_memory=total - 1).check(case.prompts, capacities)
    prepared = prepare(tmp_path, case, host_memory=total)
    assert prepared.check(case.prompts, capacities) == plan
    with OffloadedGenerator.from_prepared(prepared) as gen:
        gen.generate(random_prompts(4)[0], max_new_tokens=1)
        assert gen._calibration is not None
        with LiveTensors() as live, KVContext(gen.decoder, gen.config, gen._calibration, capacities) as context:
            for number, capacity in enumerate(capacities):
                context.reserve(number, capacity)
            assert context.host_bytes == plan.host_kv
            # Numbers beside the caches: addresses, counts and clocks of a few layers.
            assert 0 <= live.peak - (plan.labels + plan.window + plan.buffers) < 16 << 10
        prompts = random_prompts(*case.prompts)
        with LiveTensors() as live:
            outs = gen.generate(prompts, max_new_tokens=case.new)
        assert [len(out.token_ids) for out in outs] == [case.new] * len(prompts)
        assert live.peak <= plan.gpu_tensors - plan.weights
        assert outs[0].stats["host_kv_bytes"] == plan.host_kv


@pytest.mark.parametrize("name", CASES)
def test_a_step_takes_no_more_than_planned(name: str, tmp_path: Path) -> None:
    """Steps at full length without a prompt: prefill, which takes more as a rule, hides nothing."""
    case = CASES[name]
    save_tiny(tmp_path, tiny_config(case.family, case.kv_heads, **case.sizes))
    capacities = [length + 1000 for length in case.prompts]
    prepared = prepare(tmp_path, case)
    plan = prepared.check([1] * len(capacities), capacities)
    with OffloadedGenerator.from_prepared(prepared) as gen, torch.no_grad():
        gen.generate(random_prompts(4)[0], max_new_tokens=1)
        assert gen._calibration is not None
        with LiveTensors() as live, KVContext(gen.decoder, gen.config, gen._calibration, capacities) as context:
            loop = DecodeLoop(gen.decoder, context)
            for _ in range(2):
                loop.step([1] * len(capacities), capacities)
                assert loop.last is not None
                if gen.config.budget.fraction != 1:
                    compare_step(gen.decoder, context, loop.last, capacities, FidelitySums(gen.decoder.layers))
    planned = plan.step_tensors - plan.weights
    assert 0.8 * planned < live.peak <= planned


def test_what_a_generator_refuses_it_refuses_again_once_the_weights_are_there(tmp_path: Path) -> None:
    save_tiny(tmp_path, tiny_config("llama"))
    case = Case("llama", 2, [1500])
    plan = prepare(tmp_path, case).check([1500], [1503])
    with OffloadedGenerator.from_prepared(prepare(tmp_path, case, host_memory=host_total(plan, False))) as gen:
        gen.generate(random_prompts(1500)[0], max_new_tokens=3)
        with pytest.raises(MemoryPlanError, match="1,803 tokens need"):
            gen.generate(random_prompts(1800)[0], max_new_tokens=3)


GPU_CASES = {
    "long prompt": Case("llama", 8, [100_000]),
    "groups, two prompts, bf16 rows": Case("llama", 2, [60_000, 30_000], config={"kv_dtype": "fp16"}),
    "int8, groups": Case("llama", 2, [60_000], config={"kv_dtype": "int8"}),
    "int4, store on the device": Case("llama", 8, [50_000], config={"kv_dtype": "int4", "kv_location": "gpu"}),
    "top-p, groups": Case("llama", 2, [70_000], config={"token_budget": "top-p:0.9", "prefetch": "speculative"}),
    "store on the device, dense layer": Case("llama", 8, [50_000], config={"kv_location": "gpu", "dense_layers": (2,)}),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", GPU_CASES)
def test_a_gpu_run_stays_within_its_plan(name: str, tmp_path: Path) -> None:
    """The allocator is held to the plan's total: a byte more is an error."""
    case = GPU_CASES[name]
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 8, "num_hidden_layers": 6}
    tiny_config(case.family, case.kv_heads, head_dim=128, **sizes).save_pretrained(tmp_path)
    config = OffloadConfig(max_context=1 << 17, **case.config)
    prepared = PreparedModel.find(str(tmp_path), config, "dummy", "cuda", "bf16", None)
    capacities = [length + 8 for length in case.prompts]
    plan = prepared.check(case.prompts, capacities)
    memory = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    held = torch.cuda.memory_allocated()
    with OffloadedGenerator.from_prepared(prepared) as gen:
        prompts = random_prompts(*case.prompts)
        gen.generate([prompt[:64] for prompt in prompts], max_new_tokens=4)
        torch.cuda.set_per_process_memory_fraction(min(1.0, (held + plan.gpu_total) / memory))
        try:
            stats = gen.generate(prompts, max_new_tokens=8)[0].stats
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
    assert stats["gpu_planned_bytes"] == plan.gpu_tensors
    assert stats["gpu_peak_bytes"] - held == pytest.approx(plan.gpu_tensors, rel=0.1)
    assert stats["gpu_peak_bytes"] - held < plan.gpu_total
    assert stats["host_pinned_bytes"] == pytest.approx(plan.host_kv, rel=0.05)


@pytest.mark.gpu
@pytest.mark.parametrize("name", GPU_CASES)
def test_steps_on_a_gpu_stay_within_the_plan(name: str, tmp_path: Path) -> None:
    """Eager and captured steps of four long contexts, with the allocator held to what is planned without a prompt."""
    case = GPU_CASES[name]
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_hidden_layers": 4}
    tiny_config(case.family, case.kv_heads, head_dim=64, **sizes).save_pretrained(tmp_path)
    config = OffloadConfig(max_context=1 << 17, **case.config)
    prepared = PreparedModel.find(str(tmp_path), config, "dummy", "cuda", "bf16", None)
    capacities = [max(case.prompts) + 8] * 4
    plan = prepared.check([1] * 4, capacities)
    memory = torch.cuda.get_device_properties(0).total_memory
    with OffloadedGenerator.from_prepared(prepared) as gen, torch.no_grad():
        gen.generate([[1] * 64] * 4, max_new_tokens=4)
        assert gen._calibration is not None
        torch.cuda.empty_cache()
        held = torch.cuda.memory_reserved() - plan.weights
        most = held + plan.step_tensors + CUDA_RESERVE_BYTES // 2
        torch.cuda.set_per_process_memory_fraction(min(1.0, most / memory))
        try:
            with KVContext(gen.decoder, gen.config, gen._calibration, capacities) as context:
                for number, capacity in enumerate(capacities):
                    context.reserve(number, capacity)
                loop = DecodeLoop(gen.decoder, context)
                for _ in range(4):
                    loop.step([1] * 4, capacities)
                    assert loop.last is not None
                    compare_step(gen.decoder, context, loop.last, capacities, FidelitySums(gen.decoder.layers))
                torch.cuda.synchronize()
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)


def test_the_check_before_a_load_counts_the_weights(tmp_path: Path) -> None:
    save_tiny(tmp_path, tiny_config("llama"))
    prepared = prepare(tmp_path, Case("llama", 2, [100]))
    plan = prepared.check([100], [104])
    short = dataclasses.replace(
        prepared, config=dataclasses.replace(prepared.config, host_memory=host_total(plan, False) - plan.weights)
    )
    with pytest.raises(MemoryPlanError, match="104 tokens need"):
        short.check([100], [104])


@pytest.mark.parametrize(
    "name",
    [
        "one prompt",
        "head norms, bf16 rows",
        "dense layer",
        "experts",
        "store on the device",
        "int8",
        "int8, dense layer",
    ],
)
def test_a_streamed_prefill_takes_no_more_than_planned(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces and blocks much shorter than the prompt; on a CPU the hidden states are among the rest."""
    for module in ("ds_offload.prefill", "ds_offload.memory.workspace"):
        monkeypatch.setattr(f"{module}.piece_tokens", lambda heads, head_dim: 128)
    for module in ("ds_offload.stored_blocks", "ds_offload.memory.workspace"):
        monkeypatch.setattr(f"{module}.stream_tokens", lambda kv_heads, row_bytes: 100)
    case = CASES[name]
    save_tiny(tmp_path, tiny_config(case.family, case.kv_heads, **case.sizes))
    prepared = prepare(tmp_path, case)
    length = case.prompts[0]
    shape = Request(prepared.source, prepared.config, False, 1, (length,), (length + 1,)).shape()
    plan = plan_memory(shape, 0)
    with OffloadedGenerator.from_prepared(prepared) as gen, torch.no_grad():
        gen.generate(random_prompts(4)[0], max_new_tokens=1)
        assert gen._calibration is not None
        with LiveTensors() as live, KVContext(gen.decoder, gen.config, gen._calibration, [length + 1]) as context:
            context.reserve(0, length)
            held = live.peak
            prefill(gen.decoder, context, 0, random_prompts(length)[0], streamed=True)
    hidden = hidden_state_bytes(shape)
    planned = streamed_prefill_bytes(shape)
    assert live.peak - held <= planned + hidden
    assert planned < plan.prefill / 2
