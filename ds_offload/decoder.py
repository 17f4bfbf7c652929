"""Drives transformers' own decoder layers one at a time, without their attention and cache.

Norms, projections, RoPE and MLPs (MoE too) are the model's own modules, called in
the order in which its decoder layer calls them; the runtime puts its attention
between `project_qkv` and `finish_layer`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

Rope = tuple[Tensor, Tensor]

# Kinds of RoPE whose frequencies do not depend on how long the sequence is.
_LENGTH_FREE_ROPE = ("default", "linear", "yarn", "llama3")


class DecoderStack:
    """The layers of a pre-norm decoder (Llama, Mistral, Mixtral, Qwen2, Qwen3).

    N below is any number of tokens, of one or of several sequences. Tensors live on
    the model's device in the model's dtype unless said otherwise.

    Attributes:
        layers: Number of decoder layers L.
        heads, kv_heads, head_dim, hidden_size, intermediate_size: The model's shape.
        scaling: Factor of the attention scores, 1/sqrt(head_dim).
        device, dtype: Where and as what the weights are.
        blocks: The decoder layers' modules, in order.
        capturable: Whether a CUDA graph can hold a layer: a mixture of experts decides on
            the host which experts to run.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._base: Any = model.model
        self.blocks: list[Any] = list(self._base.layers)
        attention = self.blocks[0].self_attn
        self._apply_rope: Callable[..., Rope] = sys.modules[type(attention).__module__].apply_rotary_pos_emb
        self.layers = len(self.blocks)
        self.capturable = not hasattr(self.blocks[0].mlp, "experts")
        self.head_dim: int = attention.head_dim
        self.heads: int = attention.q_proj.out_features // self.head_dim
        self.kv_heads: int = attention.k_proj.out_features // self.head_dim
        self.hidden_size: int = model.config.hidden_size
        self.intermediate_size: int = model.config.intermediate_size
        self.scaling: float = attention.scaling
        self.device: torch.device = self._base.embed_tokens.weight.device
        self.dtype: torch.dtype = self._base.embed_tokens.weight.dtype

    @property
    def groups(self) -> int:
        """Query heads of one KV head."""
        return self.heads // self.kv_heads

    @property
    def final_norm(self) -> Any:
        """The norm behind the last layer."""
        return self._base.norm

    @property
    def lm_head(self) -> Any:
        """The linear module that gives logits."""
        return self._model.lm_head

    @property
    def length_free_rope(self) -> bool:
        """Whether RoPE at a position depends on nothing else, so that a batch and a graph may compute it."""
        return self._base.rotary_emb.rope_type in _LENGTH_FREE_ROPE

    def embed(self, ids: Tensor) -> Tensor:
        """Embeddings `[N, hidden]` of token ids `[N]` int64."""
        return self._base.embed_tokens(ids)

    def rotary(self, positions: Tensor) -> Rope:
        """RoPE's cos and sin, each `[N, rotary_dim]`, at positions `[N]` int64 of one sequence.

        A pure function of the positions: transformers' dynamic kinds remember the
        longest sequence they saw, so that memory is cleared first. What they then
        compute is what transformers' `generate` computes for this sequence alone.
        """
        module = self._base.rotary_emb
        if "dynamic" in module.rope_type:
            module.max_seq_len_cached = module.original_max_seq_len
            module.register_buffer("inv_freq", module.original_inv_freq.to(positions.device), persistent=False)
        probe = torch.empty(0, dtype=self.dtype, device=positions.device)
        cos, sin = module(probe, positions[None])
        return cos[0], sin[0]

    def rotary_each(self, positions: list[int]) -> Rope:
        """The same for one position of each of B sequences, each as if it were alone: `[B, rotary_dim]`."""
        at = torch.tensor(positions, dtype=torch.int64, device=self.device)
        if self.length_free_rope:
            return self.rotary(at)
        each = [self.rotary(one) for one in at[:, None]]
        return torch.cat([cos for cos, _ in each]), torch.cat([sin for _, sin in each])

    def project_qkv(self, layer: int, hidden: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """q `[N, H, D]`, k and v `[N, Hkv, D]` of `hidden` `[N, hidden]`, normed and rotated."""
        block = self.blocks[layer]
        attention = block.self_attn
        normed = block.input_layernorm(hidden)
        query = self._heads(attention.q_proj(normed), getattr(attention, "q_norm", None))
        key = self._heads(attention.k_proj(normed), getattr(attention, "k_norm", None))
        value = self._heads(attention.v_proj(normed), None)
        query, key = self._apply_rope(query, key, *rope)
        return query, key, value

    def finish_layer(self, layer: int, hidden: Tensor, attention: Tensor) -> Tensor:
        """The layer's output `[N, hidden]` from its input and its attention `[N, H * D]`."""
        block = self.blocks[layer]
        hidden = hidden + block.self_attn.o_proj(attention)
        return hidden + block.mlp(block.post_attention_layernorm(hidden)[None])[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits `[N, vocab]` float32 of the last layer's output `[N, hidden]`."""
        return self._model.lm_head(self._base.norm(hidden)).float()

    def _heads(self, projected: Tensor, norm: Callable[[Tensor], Tensor] | None) -> Tensor:
        split = projected.view(projected.shape[0], -1, self.head_dim)
        return norm(split) if norm is not None else split
