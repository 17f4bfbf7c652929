"""Tiny random models of every family, and what transformers' own `generate` says of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

VOCAB = 300
_BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    # Large enough for attention to matter: at the usual 0.02 every token looks alike.
    "initializer_range": 0.2,
    "eos_token_id": None,
    "bos_token_id": None,
}


def tiny_config(family: str, kv_heads: int = 2, **changes: Any) -> PreTrainedConfig:
    """A config of "llama", "mistral", "mixtral", "qwen2" or "qwen3" with 3 layers and 4 query heads."""
    sizes = _BASE | {"num_key_value_heads": kv_heads} | changes
    if family == "llama":
        return LlamaConfig(**sizes)
    if family == "mistral":
        return MistralConfig(**sizes, sliding_window=None)
    if family == "mixtral":
        return MixtralConfig(**sizes, num_local_experts=4, sliding_window=None)
    if family == "qwen2":
        return Qwen2Config(**sizes)
    if family == "qwen3":
        return Qwen3Config(**sizes, head_dim=32)
    raise ValueError(family)


def save_tiny(folder: Path, config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Save a random model of `config` to `folder` and return it, in eval mode."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(dtype).eval()
    model.save_pretrained(folder)
    return model


def greedy(model: PreTrainedModel, prompt: list[int], new_tokens: int) -> tuple[list[int], torch.Tensor]:
    """New tokens and their logits `[new, vocab]` by transformers' `generate`."""
    ids = torch.tensor([prompt], device=model.device)
    out = model.generate(
        ids, max_new_tokens=new_tokens, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    return out.sequences[0, len(prompt) :].tolist(), torch.stack(out.logits)[:, 0].float()


def random_prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    """Prompts of random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCAB, (length,), generator=generator).tolist() for length in lengths]
