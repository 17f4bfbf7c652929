"""A low-rank adapter in peft's files: what it changes in a model's config, and its weights merged into the model's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import PreTrainedConfig, PreTrainedModel

from ds_offload.checkpoint_folder import one_line
from ds_offload.errors import LoadError

WEIGHTS, CONFIG, CHANGES = "adapter_model.safetensors", "adapter_config.json", "config_changes.json"
_PREFIX = "base_model.model."
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"


def change_config(config: PreTrainedConfig, folder: Path) -> None:
    """Give a base model's config, in place, the positions and the RoPE base that the adapter was trained with.

    Raises:
        LoadError: The adapter's files cannot be read.
    """
    changes = _read_json(folder, CHANGES)
    try:
        config.max_position_embeddings = int(changes["max_position_embeddings"])
        config.rope_parameters = dict(config.rope_parameters) | {"rope_theta": float(changes["rope_theta"])}
    except (KeyError, TypeError, ValueError) as error:
        raise _broken(folder, f"{CHANGES}: {one_line(error)}") from error


@torch.no_grad()
def merge_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Add the adapter to a model's weights, in place: W + alpha / r * B A (LoRA, arXiv 2106.09685).

    Products are float32. Modules that the adapter holds as a whole (norms) take the place of the model's. Nothing of
    the model is changed where the adapter does not fit it.

    Args:
        model: The base model, of any dtype, on the CPU.
        folder: With `adapter_config.json` and `adapter_model.safetensors`, as peft writes them.

    Raises:
        LoadError: Files that are missing or damaged, or an adapter of another model.
    """
    config = _read_json(folder, CONFIG)
    if config.get("peft_type") != "LORA" or config.get("use_rslora") or config.get("use_dora"):
        raise _broken(folder, f"{CONFIG} is of another kind of adapter than LoRA")
    try:
        tensors = {name.removeprefix(_PREFIX): tensor for name, tensor in load_file(folder / WEIGHTS).items()}
    except Exception as error:
        raise _broken(folder, f"{WEIGHTS}: {one_line(error)}") from error
    weights = dict(model.named_parameters())
    new: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(_UP):
            continue
        target = name.removesuffix(_DOWN) + ".weight" if name.endswith(_DOWN) else name
        weight = weights.get(target)
        if weight is None:
            raise _broken(folder, f"the model has no {target}")
        whole = tensor
        if name.endswith(_DOWN):
            up = tensors.get(name.removesuffix(_DOWN) + _UP)
            if up is None or tensor.ndim != 2 or up.ndim != 2 or up.shape[1] != len(tensor):
                raise _broken(folder, f"{name} has no B of the same rank")
            product = up.float() @ tensor.float()
            whole = product.mul_(_scale(config, target, len(tensor)))
        if whole.shape != weight.shape:
            raise _broken(folder, f"{target} is {tuple(weight.shape)}, and the adapter's {tuple(whole.shape)}")
        if not torch.isfinite(whole).all():
            raise _broken(folder, f"{name} holds values that are not finite")
        new[target] = weight.float() + whole if name.endswith(_DOWN) else whole
    for target, whole in new.items():
        weights[target].copy_(whole)


def _scale(config: dict[str, Any], target: str, rank: int) -> float:
    """alpha / r of one linear layer."""
    module = target.removesuffix(".weight").rsplit(".", 1)[-1]
    return float((config.get("alpha_pattern") or {}).get(module, config.get("lora_alpha", rank))) / rank


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    try:
        content: Any = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _broken(folder, f"{name}: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise _broken(folder, f"{name} holds no JSON object")
    return content


def _broken(folder: Path, reason: str) -> LoadError:
    return LoadError(f"the adapter in {folder} cannot be used: {reason}; install the package again")
