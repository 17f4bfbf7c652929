"""`ModelShape`: the sizes of a model, from its config alone."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ds_offload.decode_layers import is_plain
from ds_offload.errors import LoadError
from ds_offload.rope_scaling import trained_context


def build_on_meta(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model's modules with parameters of `dtype` on the meta device: shapes without memory."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, attn_implementation="sdpa")


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder.

    Attributes:
        trained_context: Positions the model claims, its RoPE scaling included.
        parameters: Exact count; tied embeddings count once.
        plain: Whether every MLP is SwiGLU of linear modules, which CUDA kernels of prefill take.
    """

    layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    trained_context: int
    parameters: int
    plain: bool

    @classmethod
    def from_config(cls, config: PreTrainedConfig) -> ModelShape:
        """Read the sizes from a config of a supported family; parameters are counted on the meta device.

        Raises:
            LoadError: A config without layers.
        """
        layers = config.num_hidden_layers
        if layers < 1:
            raise LoadError(f"num_hidden_layers={layers!r} must be at least 1; fetch config.json again")
        model = build_on_meta(config, torch.bfloat16)
        heads = config.num_attention_heads
        return cls(
            layers=layers,
            hidden_size=config.hidden_size,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            intermediate_size=config.intermediate_size,
            vocab_size=config.vocab_size,
            trained_context=trained_context(config),
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            plain=all(is_plain(block) for block in model.model.layers),
        )
