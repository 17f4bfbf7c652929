"""A model's fingerprint: what a calibration belongs to."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

SAMPLE = 4096
FIELDS = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
)


def _plain(value: Any) -> Any:
    """Numbers as floats, so that 4 and 4.0 are one."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    return value


def _sample(weight: Tensor) -> bytes:
    """Up to `SAMPLE` elements at a fixed stride, rounded to bfloat16."""
    flat = weight.detach().reshape(-1)
    picked = flat[:: max(1, -(-flat.numel() // SAMPLE))]
    return picked.to(torch.bfloat16).cpu().view(torch.int16).numpy().tobytes()


def fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 in hex over the config's sizes and RoPE and over samples of the weights.

    The samples are rounded to bfloat16, so a checkpoint has one fingerprint on every
    device and whether it was loaded as fp32 or bf16.
    """
    config = model.config
    essentials = {field: getattr(config, field, None) for field in FIELDS} | {"rope": config.rope_parameters}
    digest = hashlib.sha256(json.dumps(_plain(essentials), sort_keys=True).encode())
    layers = model.model.layers
    digest.update(_sample(model.model.embed_tokens.weight))
    for number in (0, len(layers) // 2, len(layers) - 1):
        attention = layers[number].self_attn
        digest.update(_sample(attention.q_proj.weight))
        digest.update(_sample(attention.k_proj.weight))
    return digest.hexdigest()
