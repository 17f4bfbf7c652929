"""A prompt's norms, projections and MLPs: fused kernels on CUDA, the model's modules elsewhere."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ds_offload.decode_layers import epsilon, head_norms, is_plain
from ds_offload.decoder import DecoderStack, Rope
from ds_offload.kernels.prompt_rows import prompt_rows
from ds_offload.kernels.rms_norm import rms_norm
from ds_offload.kernels.skinny_linear import FLOATS
from ds_offload.kernels.swiglu import swiglu_


class PrefillLayers:
    """The parts of every layer around attention, for chunks of a prompt.

    On CUDA, with layers of plain linear modules (`fused`), what lies between two matrix products is one launch that
    reads and writes each number once, and residuals are added by the products. Anything else runs the model's own
    modules.

    Attributes:
        fused: Whether the fused kernels run.
    """

    def __init__(self, decoder: DecoderStack) -> None:
        self._decoder = decoder
        self.fused = (
            decoder.device.type == "cuda"
            and decoder.dtype in FLOATS
            and all(is_plain(block) for block in decoder.blocks)
        )

    def project(self, layer: int, hidden: Tensor, rope: Rope, queries: Tensor, rows: Tensor) -> None:
        """Make a chunk's queries and K/V.

        Args:
            hidden: `[N, hidden]`.
            rope: cos and sin `[N, D]`.
            queries: `[N, H, D]`, contiguous; written.
            rows: `[Hkv, N, 2, D]`, a head's rows side by side; written.
        """
        if not self.fused:
            query, key, value = self._decoder.project_qkv(layer, hidden, rope)
            queries.copy_(query)
            rows[:, :, 0] = key.transpose(0, 1)
            rows[:, :, 1] = value.transpose(0, 1)
            return
        block = self._decoder.blocks[layer]
        attention = block.self_attn
        normed = _normed(hidden, block.input_layernorm)
        parts = (attention.q_proj(normed), attention.k_proj(normed), attention.v_proj(normed))
        prompt_rows(*parts, rope, queries, rows, head_norms(attention))

    def finish_(self, layer: int, hidden: Tensor, attention: Tensor) -> None:
        """Turn the layer's input `hidden` `[N, hidden]` into its output, given its attention `[N, H * D]`."""
        if not self.fused:
            hidden.copy_(self._decoder.finish_layer(layer, hidden, attention))
            return
        block = self._decoder.blocks[layer]
        _add_product_(hidden, attention, block.self_attn.o_proj)
        normed = _normed(hidden, block.post_attention_layernorm)
        inner = swiglu_(block.mlp.gate_proj(normed), block.mlp.up_proj(normed))
        _add_product_(hidden, inner, block.mlp.down_proj)


def _normed(hidden: Tensor, norm: Any) -> Tensor:
    return rms_norm(hidden, norm.weight, epsilon(norm))


def _add_product_(hidden: Tensor, x: Tensor, linear: Any) -> None:
    hidden.addmm_(x, linear.weight.t())
    if linear.bias is not None:
        hidden += linear.bias
