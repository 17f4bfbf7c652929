"""The plan's bytes against what a context really allocates, and requests that do not fit."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import random_prompts, save_tiny, tiny_config

from ds_offload import OffloadConfig, OffloadedGenerator
from ds_offload.errors import MemoryPlanError
from ds_offload.kv_context import KVContext
from ds_offload.memory_check import check_request, memory_limits, plan_request

CAPACITIES = [300, 41, 77]


def tensors_of(thing: Any) -> int:
    """Bytes of every tensor that an object holds, in dicts and dataclasses too."""
    if isinstance(thing, torch.Tensor):
        return thing.nbytes
    if isinstance(thing, dict):
        return sum(tensors_of(value) for value in thing.values())
    if dataclasses.is_dataclass(thing):
        return sum(tensors_of(getattr(thing, field.name)) for field in dataclasses.fields(thing))
    return 0


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"token_budget": 24, "hot_set": 1, "segment_tokens": 64},
        {"token_budget": "1/2", "kv_dtype": "bf16", "label_bits": 4},
        {"dense_layers": (1,), "sink_tokens": 0, "recent_tokens": 7},
        {"kv_location": "gpu", "token_budget": 30},
    ],
)
def test_the_plan_is_what_a_context_allocates(changes: dict[str, Any], tmp_path: Path) -> None:
    save_tiny(tmp_path, tiny_config("llama"))
    config = OffloadConfig(max_context=1024, **changes)
    with OffloadedGenerator.from_pretrained(str(tmp_path), config=config, device="cpu") as gen:
        gen.generate(random_prompts(20)[0], max_new_tokens=1)
        plan = plan_request(gen.loaded.source, gen.config, [20, 20, 20], CAPACITIES, cuda=False)
        assert gen._calibration is not None
        with KVContext(gen.decoder, gen.config, gen._calibration, CAPACITIES) as context:
            for number, capacity in enumerate(CAPACITIES):
                context.reserve(number, capacity)
            assert plan.labels == context.labels.nbytes
            held = context.hot_set
            assert plan.window == (0 if held is None else tensors_of(held._rows)), "until the first step"
            if held is not None:
                held.make()
                assert plan.window + plan.hot_set == tensors_of(held._rows) + tensors_of(held._state)
            assert plan.host_kv == context.host_bytes == (0 if held is None else context.store.nbytes)
            buffers = context._new_rows.nbytes + sum(dense.nbytes for dense in context._dense)
            if held is None:
                buffers += context.store.nbytes
            assert plan.buffers == buffers
        parameters = sum(parameter.nbytes for parameter in gen.loaded.model.parameters())
    assert plan.weights == parameters


def test_prefill_grows_with_the_prompt_and_not_with_the_layers(tmp_path: Path) -> None:
    plans = {}
    for layers in (2, 8):
        folder = tmp_path / str(layers)
        save_tiny(folder, tiny_config("llama", num_hidden_layers=layers))
        with OffloadedGenerator.from_pretrained(str(folder), device="cpu") as gen:
            for prompt in (10_000, 20_000):
                plans[layers, prompt] = plan_request(gen.loaded.source, gen.config, [prompt], [prompt + 1]).prefill
    assert plans[2, 10_000] == plans[8, 10_000]
    # Four bytes each: hidden, queries, two layers' K/V, RoPE; and the MLP's chunk, which both prompts fit in: its norm,
    # gate and up. Eight of the token ids.
    per_token = 64 + 64 + 4 * 2 * 16 + 2 * 16 + 64 + 2 * 128
    assert plans[2, 20_000] - plans[2, 10_000] == 10_000 * (4 * per_token + 8)


def test_what_does_not_fit_is_refused_in_one_line(tmp_path: Path) -> None:
    save_tiny(tmp_path, tiny_config("llama"))
    with pytest.raises(MemoryPlanError, match="weights need") as error:
        OffloadedGenerator.from_pretrained(
            str(tmp_path), config=OffloadConfig(max_context=1024, host_memory="16KiB"), device="cpu"
        )
    assert "\n" not in str(error.value)
    assert str(error.value).endswith("(host_memory); raise host_memory, or choose a smaller model")
    with OffloadedGenerator.from_pretrained(
        str(tmp_path), config=OffloadConfig(max_context=100_000, host_memory="8MiB"), device="cpu"
    ) as gen:
        gen.generate(random_prompts(20)[0], max_new_tokens=1)
        with pytest.raises(MemoryPlanError, match=r"90,004 tokens need .* of host memory and .* are there") as error:
            gen.generate(random_prompts(90_000)[0], max_new_tokens=4)
        assert "\n" not in str(error.value)
        found = re.search(r"at most ([\d,]+) tokens fit", str(error.value))
        assert found is not None
        longest = int(found[1].replace(",", ""))
        check_request(gen.loaded, gen.config, [longest], [longest])
        with pytest.raises(MemoryPlanError, match="tokens need"):
            check_request(gen.loaded, gen.config, [longest + 1], [longest + 1])


def test_the_hot_set_is_chosen_for_each_call_and_a_smaller_one_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny(tmp_path, tiny_config("llama", num_hidden_layers=48))
    config = OffloadConfig(max_context=8192, token_budget="1/4")
    with OffloadedGenerator.from_pretrained(str(tmp_path), config=config, device="cpu") as gen:
        prompt = random_prompts(2000)[0]
        gen.generate(prompt, max_new_tokens=1)
        assert gen.config.hot_set == 4 and "hot set" not in capsys.readouterr().err
        tight = dataclasses.replace(gen.config, hot_set=2)
        plan = plan_request(gen.loaded.source, tight, [2000], [2001], cuda=False)
        gen.config = dataclasses.replace(gen.config, host_memory=plan.gpu_total + plan.host_kv)
        gen.generate(prompt, max_new_tokens=1)
        assert gen.config.hot_set == 2
        assert "hot set: 2 x the budget, the most that fits; 4 x is faster" in capsys.readouterr().err
        gen.generate(prompt[:500], max_new_tokens=1)
        assert gen.config.hot_set == 4


def test_the_smallest_change_is_named(tmp_path: Path) -> None:
    """A budget of half the context keeps every row twice: without the second copies it fits."""
    save_tiny(tmp_path, tiny_config("llama", num_hidden_layers=48))
    config = OffloadConfig(max_context=8192, token_budget="1/4", hot_set=4, kv_dtype="fp32")
    with OffloadedGenerator.from_pretrained(str(tmp_path), config=config, device="cpu") as gen:
        wanted = dataclasses.replace(gen.config, hot_set=1.2)
        short = plan_request(gen.loaded.source, wanted, [1000], [4000], cuda=False)
        gen.config = dataclasses.replace(gen.config, host_memory=short.gpu_total + short.host_kv)
        with pytest.raises(MemoryPlanError, match=r"--hot-set 1\.2 makes it fit"):
            check_request(gen.loaded, gen.config, [1000], [4000])
        check_request(gen.loaded, dataclasses.replace(gen.config, hot_set=1.2), [1000], [4000])


def test_a_window_longer_than_the_context_is_named(tmp_path: Path) -> None:
    """A smaller model would not help."""
    save_tiny(tmp_path, tiny_config("llama"))
    config = OffloadConfig(max_context=1024, recent_tokens=2**40)
    said = r"; lower sink_tokens and recent_tokens, together 1,099,511,627,780 and more than max_context=1,024$"
    with (
        OffloadedGenerator.from_pretrained(str(tmp_path), config=config, device="cpu") as gen,
        pytest.raises(MemoryPlanError, match=said),
    ):
        gen.generate(random_prompts(20)[0], max_new_tokens=1)


@pytest.mark.gpu
def test_gpu_memory_only_lowers_what_is_free(tmp_path: Path) -> None:
    save_tiny(tmp_path, tiny_config("llama"))
    device = torch.device("cuda", 0)
    free = memory_limits(OffloadConfig(), device).gpu
    assert free is not None and memory_limits(OffloadConfig(gpu_memory="900GiB"), device).gpu == pytest.approx(free)
    assert memory_limits(OffloadConfig(gpu_memory="64MiB"), device).gpu == 64 << 20
    with pytest.raises(MemoryPlanError, match=r"weights need .* of GPU memory"):
        OffloadedGenerator.from_pretrained(str(tmp_path), config=OffloadConfig(gpu_memory="64MiB"), device="cuda")
