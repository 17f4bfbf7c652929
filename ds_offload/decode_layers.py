"""A decode step's norms, projections and MLPs: fused kernels on CUDA, the model's modules elsewhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ds_offload.decoder import DecoderStack
from ds_offload.kernels.new_token import HeadNorms
from ds_offload.kernels.skinny_linear import FLOATS, MAX_ROWS, gated_linear, skinny_linear
from ds_offload.notices import notice


class DecodeLayers:
    """The parts of every layer around attention, for the few tokens of a step.

    On CUDA, with at most 16 sequences and layers of plain linear modules (`fused`), norms,
    biases, residuals and SwiGLU are folded into the kernels that read the weights, and a
    sequence's numbers do not depend on the batch. Anything else runs the model's own
    modules in the order in which its decoder layer calls them.

    Args:
        decoder: The model.
        sequences: Tokens of a step.

    Attributes:
        fused: Whether the fused kernels run.
    """

    def __init__(self, decoder: DecoderStack, sequences: int) -> None:
        self._decoder = decoder
        self._blocks = decoder.blocks
        self.fused = (
            decoder.device.type == "cuda"
            and sequences <= MAX_ROWS
            and decoder.dtype in FLOATS
            and all(is_plain(block) for block in self._blocks)
        )
        if decoder.device.type == "cuda" and sequences > MAX_ROWS:
            notice(f"{sequences} sequences decode with the model's own layers; up to {MAX_ROWS} have faster ones")

    def project(self, layer: int, hidden: Tensor) -> Tensor:
        """Queries, keys and values of `hidden` `[N, hidden]`, before norms and RoPE: `[N, (H + 2 * Hkv) * D]`."""
        block = self._blocks[layer]
        parts = [getattr(block.self_attn, name) for name in ("q_proj", "k_proj", "v_proj")]
        if self.fused:
            return self._linear(hidden, parts, block.input_layernorm)
        normed = block.input_layernorm(hidden)
        return torch.cat([part(normed) for part in parts], -1)

    def project_query(self, layer: int, hidden: Tensor) -> Tensor:
        """Queries alone: `[N, H, D]`."""
        block = self._blocks[layer]
        if self.fused:
            query = self._linear(hidden, [block.self_attn.q_proj], block.input_layernorm)
        else:
            query = block.self_attn.q_proj(block.input_layernorm(hidden))
        return query.view(len(hidden), -1, self._decoder.head_dim)

    def head_norms(self, layer: int) -> HeadNorms | None:
        """The norms of every head's query and key, where the model has them."""
        return head_norms(self._blocks[layer].self_attn)

    def finish(self, layer: int, hidden: Tensor, attention: Tensor) -> Tensor:
        """The layer's output `[N, hidden]` from its input and its attention `[N, H * D]`."""
        if not self.fused:
            return self._decoder.finish_layer(layer, hidden, attention)
        block = self._blocks[layer]
        hidden = self._linear(attention, [block.self_attn.o_proj], None, hidden)
        norm = block.post_attention_layernorm
        inner = gated_linear(hidden, block.mlp.gate_proj.weight, block.mlp.up_proj.weight, (norm.weight, epsilon(norm)))
        return self._linear(inner, [block.mlp.down_proj], None, hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits `[N, vocab]` float32 of the last layer's output `[N, hidden]`."""
        head, norm = self._decoder.lm_head, self._decoder.final_norm
        if not self.fused:
            return self._decoder.logits(hidden)
        out = torch.empty(len(hidden), head.out_features, dtype=torch.float32, device=hidden.device)
        return skinny_linear(hidden, [head.weight], [head.bias], (norm.weight, epsilon(norm)), out=out)

    @staticmethod
    def _linear(x: Tensor, modules: list[Any], norm: Any, residual: Tensor | None = None) -> Tensor:
        return skinny_linear(
            x,
            [module.weight for module in modules],
            [module.bias for module in modules],
            (norm.weight, epsilon(norm)) if norm is not None else None,
            residual,
        )


def head_norms(attention: Any) -> HeadNorms | None:
    """The norms of every head's query and key, where an attention module has them."""
    norm = getattr(attention, "q_norm", None)
    return HeadNorms(norm.weight, attention.k_norm.weight, epsilon(norm)) if norm is not None else None


def epsilon(norm: Any) -> float:
    """What an RMSNorm adds to the mean square."""
    return norm.variance_epsilon


def is_plain(block: Any) -> bool:
    """Whether a decoder layer's MLP is SwiGLU of linear modules without biases."""
    parts = [getattr(block.mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    if not all(isinstance(part, nn.Linear) and part.bias is None for part in parts):
        return False
    probe = torch.linspace(-4, 4, 9)
    return torch.equal(block.mlp.act_fn(probe), nn.functional.silu(probe))
