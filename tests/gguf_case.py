"""GGUF files of tiny random models, written as llama.cpp converts them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

EOS = 1


def tiny_llama(**changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    fields: dict[str, Any] = dict(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=261,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        bos_token_id=0,
        eos_token_id=EOS,
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(LlamaConfig(**fields | changes)).eval()


def paired(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a q or k projection in GGUF's order: the two halves of a head's RoPE pairs side by side."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    metadata: dict[str, Any] | None = None,
    more: dict[str, np.ndarray] | None = None,
) -> None:
    """Save the model as float32 GGUF with a byte-level vocabulary: <s>, </s>, <unk>, the 256 bytes and two merges.

    Args:
        metadata: Keys and values beside the usual ones: texts, whole numbers and floats.
        more: Tensors beside the model's.
    """
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    config, weights = model.config, model.state_dict()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<s>", "</s>", "<unk>", *bytes_to_unicode().values(), "ab", "abc"])
    writer.add_token_types([3, 3, 3] + [1] * 258)
    writer.add_token_merges(["a b", "ab c"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(EOS)
    writer.add_unk_token_id(2)
    names = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    parts = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    for layer in range(config.num_hidden_layers):
        for ours, theirs in parts.items():
            names[f"model.layers.{layer}.{ours}.weight"] = f"blk.{layer}.{theirs}.weight"
    for ours, theirs in names.items():
        weight = weights[ours]
        if theirs.endswith("attn_q.weight"):
            weight = paired(weight, config.num_attention_heads)
        if theirs.endswith("attn_k.weight"):
            weight = paired(weight, config.num_key_value_heads)
        writer.add_tensor(theirs, np.ascontiguousarray(weight.numpy()))
    for key, value in (metadata or {}).items():
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)]
        add(key, value)
    for name, tensor in (more or {}).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
