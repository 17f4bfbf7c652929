"""Tiny models to calibrate, and calibrations compared."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen2Config, Qwen3Config
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from ds_offload.byte_tokenizer import ByteTokenizer
from ds_offload.calibration import Calibration, calibrate
from ds_offload.decoder import DecoderStack
from ds_offload.loading import LoadedModel, ModelSource
from ds_offload.model_shape import ModelShape

SIZES = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "vocab_size": 300,
    "max_position_embeddings": 128,
    "head_dim": 12,
}
FAMILIES = {
    "MHA": (LlamaConfig, 4, 4),
    "GQA": (LlamaConfig, 6, 2),
    "MQA": (LlamaConfig, 3, 1),
    "biases": (Qwen2Config, 4, 2),
    "q/k-norm": (Qwen3Config, 4, 2),
}
FINGERPRINT = "0123456789abcdef" * 4
# The statistics of a calibration.
NAMES = ("channels", "importance", "key_mean", "key_factor")


def tiny_model(family: str = "GQA", dtype: torch.dtype = torch.float64, **changes: int) -> PreTrainedModel:
    kind, heads, kv_heads = FAMILIES[family]
    config = kind(num_attention_heads=heads, num_key_value_heads=kv_heads, **SIZES | changes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    for parameter in model.parameters():
        parameter.data.normal_(0.2, 0.3)
    return model.eval()


def loaded_model(
    family: str = "GQA",
    *,
    tokenizer: bool = True,
    load_format: str = "auto",
    fingerprint: str = FINGERPRINT,
    **changes: int,
) -> LoadedModel:
    model = tiny_model(family, torch.float32, **changes)
    config: PreTrainedConfig = model.config
    source = ModelSource("tiny", "", load_format, config, ModelShape.from_config(config), torch.float32)
    text = ByteTokenizer(config.vocab_size) if tokenizer else None
    return LoadedModel(source, model, text, torch.device("cpu"), frozenset(), fingerprint)


def token_ids(count: int, seed: int = 1) -> list[int]:
    return torch.randint(0, 300, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def small_calibration() -> Calibration:
    """Of 30 tokens, too few for label masses."""
    return calibrate(DecoderStack(tiny_model()), token_ids(30), fingerprint=FINGERPRINT, text="a text: ünïcode, 文")


def plain(calibration: Calibration) -> list:
    values = [getattr(calibration, field.name) for field in dataclasses.fields(Calibration)]
    codes = calibration.codes.tensors() if calibration.codes is not None else ()
    return [value for value in values if value is not calibration.codes] + list(codes)


def same(one: Calibration, other: Calibration) -> bool:
    return all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(plain(one), plain(other), strict=True)
    )
