"""The adapter on disk: peft's files for who uses it, and one file to go on training from."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from ds_offload.errors import InputError
from long_context.adapted_llama import LINEAR, NORMS, AdaptedLlama

STATE = "training_state.safetensors"
WEIGHTS, CONFIG, CHANGES = "adapter_model.safetensors", "adapter_config.json", "config_changes.json"
_PREFIX = "base_model.model.model"


def save_adapter(model: AdaptedLlama, folder: Path, base: str) -> None:
    """Write the adapter as peft reads it, and what changes in the model's config.

    The matrices are float16, the norms, which are whole and not differences, float32.

    Args:
        base: The model that it belongs to.
    """
    shape = model.shape
    tensors = {}
    for kind, part in LINEAR.items():
        for layer, (down, up) in enumerate(zip(model.down[kind], model.up[kind], strict=True)):
            name = f"{_PREFIX}.layers.{layer}.{part}.{kind}"
            tensors[f"{name}.lora_A.weight"] = down.detach().half().cpu()
            tensors[f"{name}.lora_B.weight"] = up.detach().half().cpu()
    for name in NORMS:
        for layer, weight in enumerate(model.norms[name]):
            tensors[f"{_PREFIX}.layers.{layer}.{name}.weight"] = weight.detach().cpu().clone()
    tensors[f"{_PREFIX}.norm.weight"] = model.norms["norm"].detach().cpu().clone()
    of_mlp = {kind: shape.mlp_rank for kind, part in LINEAR.items() if part == "mlp"}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": shape.attention_rank,
        "lora_alpha": shape.attention_rank,
        "rank_pattern": of_mlp,
        "alpha_pattern": of_mlp,
        "target_modules": list(LINEAR),
        "modules_to_save": [*NORMS, "norm"],
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    changes = {"max_position_embeddings": shape.max_positions, "rope_theta": shape.rope_theta}
    _write(folder, tensors, config, changes)


def scale_adapter(folder: Path, scaled: Path, base: PreTrainedModel, share: float) -> None:
    """Write an adapter that goes `share` of the way from the base model's weights to the adapted ones.

    Between the two a model keeps more of what the base model could (WiSE-FT, arXiv 2109.01903). The config's changes,
    positions and RoPE base, are kept whole.

    Args:
        folder: The adapter.
        scaled: Where the new one is written.
        base: The base model, on the CPU.
        share: From 0 to 1.

    Raises:
        InputError: Another share, or a folder that holds no adapter of this model.
    """
    if not 0 <= share <= 1:
        raise InputError(f"a share of {share:g}: give one from 0 (the base model) to 1 (the adapter)")
    weights = dict(base.named_parameters())
    try:
        tensors = load_file(folder / WEIGHTS)
        config, changes = (json.loads((folder / name).read_text(encoding="utf-8")) for name in (CONFIG, CHANGES))
        for name, tensor in tensors.items():
            if name.endswith(".lora_B.weight"):
                tensors[name] = (share * tensor.float()).to(tensor.dtype)
            elif not name.endswith(".lora_A.weight"):
                whole = weights[name.removeprefix("base_model.model.")].detach().float()
                tensors[name] = torch.lerp(whole, tensor.float(), share).to(tensor.dtype)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{folder} holds no adapter of this model: {error}") from error
    _write(scaled, tensors, config, changes)


def _write(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any], changes: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / WEIGHTS, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    for name, fields in ((CONFIG, config), (CHANGES, changes)):
        text = json.dumps(fields, indent=2) + "\n"
        _replace(folder / name, lambda path, text=text: path.write_text(text, encoding="utf-8"))


def save_state(
    parameters: dict[str, Tensor], optimizer: torch.optim.Optimizer, progress: dict[str, Any], folder: Path
) -> None:
    """Write what training goes on from, in one file that is there whole or not at all.

    A and B are float16 and Adam's moments bfloat16, so that it stays small.
    """
    tensors = {}
    for name, weight in parameters.items():
        small = torch.float16 if weight.dim() == 3 else torch.float32
        tensors[name] = weight.detach().to(small).cpu()
        moments = optimizer.state[weight]
        if moments:
            for moment in ("exp_avg", "exp_avg_sq"):
                tensors[f"{name}.{moment}"] = moments[moment].to(torch.bfloat16).cpu()
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / STATE, lambda path: save_file(tensors, path, metadata={"progress": json.dumps(progress)}))


def load_state(parameters: dict[str, Tensor], optimizer: torch.optim.Optimizer, folder: Path) -> dict[str, Any]:
    """Read parameters and moments back in place; returns the progress."""
    with safe_open(folder / STATE, "pt") as file:
        progress: dict[str, Any] = json.loads(file.metadata()["progress"])
        names = set(file.keys())
        for name, weight in parameters.items():
            with torch.no_grad():
                weight.copy_(file.get_tensor(name))
            if f"{name}.exp_avg" in names:
                optimizer.state[weight] = {
                    "step": torch.tensor(float(progress["step"]), device=weight.device),
                    **{
                        moment: file.get_tensor(f"{name}.{moment}").to(weight.device, torch.float32)
                        for moment in ("exp_avg", "exp_avg_sq")
                    },
                }
    return progress


def _replace(path: Path, write: Any) -> None:
    partial = path.with_name(path.name + ".partial")
    write(partial)
    os.replace(partial, path)
