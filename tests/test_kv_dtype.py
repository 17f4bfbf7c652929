"""K/V stored in fewer bits: near the model's own, the same in every mode, and chosen where they must be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from generator_case import LENGTHS, NEW, make
from tiny_models import random_prompts, save_tiny, tiny_config

from ds_offload.errors import MemoryPlanError
from ds_offload.memory_check import check_request
from ds_offload.planning.request import host_total


@pytest.mark.parametrize("kv_dtype", ["int8", "int4"])
@pytest.mark.parametrize(("kv_heads", "budget"), [(1, 7), (2, 24), (4, "1/4"), (2, "1/1"), (2, 1)])
def test_quantised_exact_off_and_gpu_give_identical_tokens(
    kv_dtype: str, kv_heads: int, budget: int | str, tmp_path: Path
) -> None:
    save_tiny(tmp_path, tiny_config("llama", kv_heads))
    prompts = random_prompts(*LENGTHS)
    results = {}
    for prefetch, location in (("exact", "host"), ("off", "host"), ("off", "gpu")):
        changes = {"prefetch": prefetch, "kv_location": location, "hot_set": 1, "kv_dtype": kv_dtype}
        with make(tmp_path, token_budget=budget, segment_tokens=64, **changes) as gen:
            outs = gen.generate(prompts, max_new_tokens=NEW, output_logits=True)
            alone = gen.generate(prompts[1], max_new_tokens=NEW)
        results[prefetch, location] = torch.stack([out.logits for out in outs])
        assert alone.token_ids == outs[1].token_ids
    for other in results.values():
        assert torch.equal(other, results["exact", "host"])


@pytest.mark.parametrize("changes", [{}, {"prefetch": "speculative"}, {"dense_layers": (1,)}, {"hot_set": 0}])
@pytest.mark.parametrize(("kv_dtype", "tolerance"), [("int8", 0.02), ("int4", 0.35)])
def test_quantised_rows_change_logits_little(
    kv_dtype: str, tolerance: float, changes: dict[str, Any], tiny_llama: Path
) -> None:
    """Relative distance of a step's logits at the same tokens; random weights attend to every token alike."""
    prompts = random_prompts(*LENGTHS)
    logits = {}
    for stored in ("fp32", kv_dtype):
        with make(tiny_llama, token_budget="1/1", kv_dtype=stored, **changes) as gen:
            logits[stored] = torch.stack(
                [out.logits[:2] for out in gen.generate(prompts, max_new_tokens=2, output_logits=True)]
            )
    first = logits["fp32"][:, 0]
    assert torch.equal(first, logits[kv_dtype][:, 0]), "the prompt itself is read exactly"
    far = (logits["fp32"] - logits[kv_dtype])[:, 1].norm() / first.norm()
    assert 0 < far < tolerance


def test_auto_takes_fewer_bits_where_the_host_has_no_room(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = random_prompts(900)[0]
    needed = {}
    for kv_dtype in ("fp32", "int8", "int4"):
        with make(tiny_llama, kv_dtype=kv_dtype, hot_set=1) as gen:
            plan = check_request(gen.loaded, gen.config, [900], [903])
            needed[kv_dtype] = host_total(plan, cuda=False)
    for kv_dtype, room in needed.items():
        with make(tiny_llama, hot_set=1, host_memory=room) as gen:
            capsys.readouterr()
            gen.generate(prompt, max_new_tokens=3)
            assert gen.config.kv_dtype == kv_dtype
            said = f"K/V are stored as {kv_dtype}: as fp32 they do not fit"
            assert (said in capsys.readouterr().err) == (kv_dtype != "fp32")
    with make(tiny_llama, hot_set=1, host_memory=needed["int4"] - 1) as gen, pytest.raises(MemoryPlanError):
        gen.generate(prompt, max_new_tokens=3)


def test_kv_stored_in_another_dtype_stays_near(tiny_llama: Path) -> None:
    prompt = random_prompts(150)[0]
    with make(tiny_llama, token_budget="1/1") as gen:
        full = gen.generate(prompt, max_new_tokens=2, output_logits=True)
    with make(tiny_llama, token_budget="1/1", kv_dtype="bf16") as gen:
        half = gen.generate(prompt, max_new_tokens=2, output_logits=True)
    assert half.stats["host_kv_bytes"] == full.stats["host_kv_bytes"] // 2
    error = (half.logits[1] - full.logits[1]).norm() / full.logits[1].norm()
    assert 0 < error < 5e-2
