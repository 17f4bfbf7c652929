"""The shipped adapter and adapters of a tiny model: merged as W + alpha / r * B A, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_config
from transformers import AutoModelForCausalLM

from ds_offload.adapter import CONFIG, WEIGHTS, change_config, merge_adapter
from ds_offload.aliases import ALIASES, LONG_MODEL
from ds_offload.errors import LoadError
from ds_offload.loading import ADAPTER, find_model, load_tokenizer, load_weights

RANKS = {"q_proj": 4, "down_proj": 2}


def tiny_model() -> Any:
    torch.manual_seed(5)
    return AutoModelForCausalLM.from_config(tiny_config("llama")).eval()


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter of the tiny model's q and down projections, with two ranks and scales, and of its first norms."""
    chance, tensors = torch.Generator().manual_seed(1), {}
    for name, weight in tiny_model().named_parameters():
        kind = name.split(".")[-2]
        if kind in RANKS:
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            out, width = weight.shape
            tensors[f"{stem}.lora_A.weight"] = torch.randn(RANKS[kind], width, generator=chance).half()
            tensors[f"{stem}.lora_B.weight"] = torch.randn(out, RANKS[kind], generator=chance).half()
        elif kind == "input_layernorm":
            tensors[f"base_model.model.{name}"] = torch.rand(weight.shape, generator=chance)
    save_file(tensors, tmp_path / WEIGHTS)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "tiny",
        "r": 4,
        "lora_alpha": 6,
        "rank_pattern": {"down_proj": 2},
        "alpha_pattern": {"down_proj": 5},
        "target_modules": list(RANKS),
        "modules_to_save": ["input_layernorm"],
        "inference_mode": True,
    }
    (tmp_path / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    return tmp_path


def test_the_merge_is_the_formula(adapter: Path) -> None:
    base, merged = tiny_model(), tiny_model()
    merge_adapter(merged, adapter)
    tensors, changed = load_file(adapter / WEIGHTS), set()
    expected = {name: weight.double() for name, weight in base.named_parameters()}
    for name, tensor in tensors.items():
        target = name.removeprefix("base_model.model.")
        if target.endswith(".lora_A.weight"):
            up = tensors[name.replace("lora_A", "lora_B")].double()
            target = target.replace(".lora_A.weight", ".weight")
            scale = 5 / 2 if "down_proj" in target else 6 / 4
            expected[target] = expected[target] + scale * up @ tensor.double()
        elif "lora_B" in target:
            continue
        else:
            expected[target] = tensor.double()
        changed.add(target)
    assert len(changed) == 3 * base.config.num_hidden_layers
    for name, weight in merged.named_parameters():
        torch.testing.assert_close(weight.double(), expected[name], rtol=1e-6, atol=1e-6)
        assert torch.equal(weight, base.get_parameter(name)) == (name not in changed)


def test_the_merge_is_that_of_peft(adapter: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed: the merge is held to its formula only")
    merged = tiny_model()
    merge_adapter(merged, adapter)
    theirs = peft.PeftModel.from_pretrained(tiny_model(), str(adapter)).merge_and_unload()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)


def damage(folder: Path, how: str) -> None:
    tensors = load_file(folder / WEIGHTS)
    first = next(name for name in tensors if "lora_A" in name)
    if how == "truncated":
        data = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(data[: len(data) // 2])
    elif how == "missing":
        (folder / CONFIG).unlink()
    elif how == "no B":
        del tensors[first.replace("lora_A", "lora_B")]
        save_file(tensors, folder / WEIGHTS)
    elif how == "shape":
        tensors[first] = tensors[first][:, :-1].contiguous()
        save_file(tensors, folder / WEIGHTS)
    elif how == "name":
        tensors["base_model.model.model.layers.99.norm.weight"] = torch.ones(4)
        save_file(tensors, folder / WEIGHTS)
    elif how == "not finite":
        tensors[first][0, 0] = float("nan")
        save_file(tensors, folder / WEIGHTS)
    elif how == "kind":
        (folder / CONFIG).write_text('{"peft_type": "IA3"}', encoding="utf-8")


@pytest.mark.parametrize("how", ["truncated", "missing", "no B", "shape", "name", "not finite", "kind"])
def test_a_damaged_adapter_is_refused_and_changes_nothing(adapter: Path, how: str) -> None:
    damage(adapter, how)
    model = tiny_model()
    with pytest.raises(LoadError, match=r"cannot be used.*install the package again") as refused:
        merge_adapter(model, adapter)
    assert "\n" not in str(refused.value)
    for name, weight in tiny_model().named_parameters():
        assert torch.equal(weight, model.get_parameter(name)), name


def test_changes_that_are_missing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"config_changes\.json"):
        change_config(ALIASES[LONG_MODEL].config(), tmp_path)


def test_the_shipped_adapter_is_small() -> None:
    assert sum(path.stat().st_size for path in ADAPTER.iterdir()) < 12e6
    config = ALIASES["smollm2-135m"].config()
    change_config(config, ADAPTER)
    known = ALIASES[LONG_MODEL].config()
    assert config.max_position_embeddings == known.max_position_embeddings == 65_536
    assert config.rope_parameters == known.rope_parameters


def test_the_alias_loads_without_a_hub(smollm2: Any) -> None:
    source = find_model(LONG_MODEL)
    assert source.shape.trained_context == 65_536 and source.adapter == ADAPTER
    assert load_tokenizer(source).model_max_length == 65_536
    long, base = (load_weights(find_model(name), torch.device("cpu")) for name in (LONG_MODEL, "smollm2-135m"))
    assert long.fingerprint != base.fingerprint and long.eos_token_ids == base.eos_token_ids
    tensors = load_file(ADAPTER / WEIGHTS)
    stem = "model.layers.7.self_attn.q_proj"
    down, up = (tensors[f"base_model.model.{stem}.lora_{part}.weight"].double() for part in "AB")
    expected = base.model.get_parameter(f"{stem}.weight").double() + up @ down
    torch.testing.assert_close(long.model.get_parameter(f"{stem}.weight").double(), expected, rtol=1e-5, atol=1e-6)
