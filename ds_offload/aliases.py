"""Short names for the models people ask for: hub id and the exact shape."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

DEFAULT_MODEL = "smollm2-135m"
# The default model with the adapter that ships with the package.
LONG_MODEL = "smollm2-135m-64k"
# Both need no hub, and are float32 as they are made.
SHIPPED_MODELS = (DEFAULT_MODEL, LONG_MODEL)


@dataclass(frozen=True)
class Alias:
    """A model by its short name.

    Attributes:
        hub_id: Where its weights are on the hub.
        model_type: Family, as transformers names it.
        fields: The checkpoint's config.json, as far as it decides shapes and numbers.
    """

    hub_id: str
    model_type: str
    fields: dict[str, Any]

    def config(self) -> PreTrainedConfig:
        """A fresh config; nothing is read from disk or network."""
        return CONFIG_MAPPING[self.model_type](**copy.deepcopy(self.fields))


def _rope(theta: float, **scaling: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta} | scaling


_LLAMA3_ROPE = _rope(
    500000.0,
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)


def _llama2(layers: int, hidden: int, heads: int, kv_heads: int, intermediate: int) -> dict[str, Any]:
    return {
        "vocab_size": 32000,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_parameters": _rope(10000.0),
    }


def _llama31(layers: int, hidden: int, heads: int, intermediate: int) -> dict[str, Any]:
    return {
        "vocab_size": 128256,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": _LLAMA3_ROPE,
        "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009],
    }


def _smollm2(positions: int, theta: float) -> dict[str, Any]:
    return {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": positions,
        "rms_norm_eps": 1e-5,
        "rope_parameters": _rope(theta),
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }


ALIASES = {
    DEFAULT_MODEL: Alias("HuggingFaceTB/SmolLM2-135M-Instruct", "llama", _smollm2(8192, 100000.0)),
    LONG_MODEL: Alias("HuggingFaceTB/SmolLM2-135M-Instruct", "llama", _smollm2(65536, 2500000.0)),
    "llama-2-7b": Alias("meta-llama/Llama-2-7b-chat-hf", "llama", _llama2(32, 4096, 32, 32, 11008)),
    "llama-2-13b": Alias("meta-llama/Llama-2-13b-chat-hf", "llama", _llama2(40, 5120, 40, 40, 13824)),
    "llama-2-70b": Alias("meta-llama/Llama-2-70b-chat-hf", "llama", _llama2(80, 8192, 64, 8, 28672)),
    "llama-3.1-8b": Alias("meta-llama/Llama-3.1-8B-Instruct", "llama", _llama31(32, 4096, 32, 14336)),
    "llama-3.1-70b": Alias("meta-llama/Llama-3.1-70B-Instruct", "llama", _llama31(80, 8192, 64, 28672)),
    "mistral-7b": Alias(
        "mistralai/Mistral-7B-Instruct-v0.3",
        "mistral",
        {
            "vocab_size": 32768,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-5,
            "rope_parameters": _rope(1000000.0),
            "sliding_window": None,
        },
    ),
    "mixtral-8x7b": Alias(
        "mistralai/Mixtral-8x7B-Instruct-v0.1",
        "mixtral",
        {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-5,
            "rope_parameters": _rope(1000000.0),
            "sliding_window": None,
        },
    ),
    "qwen2.5-7b": Alias(
        "Qwen/Qwen2.5-7B-Instruct",
        "qwen2",
        {
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6,
            "rope_parameters": _rope(1000000.0),
            "bos_token_id": 151643,
            "eos_token_id": 151645,
        },
    ),
    "qwen3-8b": Alias(
        "Qwen/Qwen3-8B",
        "qwen3",
        {
            "vocab_size": 151936,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 40960,
            "rms_norm_eps": 1e-6,
            "rope_parameters": _rope(1000000.0),
            "bos_token_id": 151643,
            "eos_token_id": 151645,
        },
    ),
}
