"""A Llama whose linear layers carry a low-rank adapter, as training needs it: no cache, no mask, little memory.

The adapter is LoRA (arXiv 2106.09685): a linear layer's weight is W + B A. Its sum is made once a step, so that a
token costs no more than without an adapter, and the gradients of A and B come from that of the sum. With sequences of
thousands of tokens this is less work than `x A^T B^T` beside each of the 210 products, which is how peft runs it; the
numbers are the same, and the files are peft's (adapter_files.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Each linear layer of a decoder layer, and the module it is in.
LINEAR = {
    "q_proj": "self_attn",
    "k_proj": "self_attn",
    "v_proj": "self_attn",
    "o_proj": "self_attn",
    "gate_proj": "mlp",
    "up_proj": "mlp",
    "down_proj": "mlp",
}
NORMS = ("input_layernorm", "post_attention_layernorm")
# Rows of the vocabulary's logits that exist at once.
LOGIT_ROWS = 4096

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class AdapterShape:
    """What the adapter changes.

    Attributes:
        attention_rank: Of the four linear layers of attention.
        mlp_rank: Of the three of the MLP.
        rope_theta: The RoPE base, in the place of the model's.
        max_positions: Tokens that the model is trained for.
    """

    attention_rank: int = 32
    mlp_rank: int = 8
    rope_theta: float = 2_500_000.0
    max_positions: int = 65_536

    def rank(self, kind: str) -> int:
        """The rank of one kind of linear layer."""
        return self.attention_rank if LINEAR[kind] == "self_attn" else self.mlp_rank


def dense_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention, `[B, H, T, D]` each."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


@dataclass
class AdaptedLlama:
    """Frozen weights of a Llama and the adapter's parameters, stacked over the layers.

    Attributes:
        config: The model's.
        shape: The adapter's.
        base: Kind to weights `[L, out, in]` float32, frozen.
        embedding: `[V, C]` in `dtype`, frozen; the head too.
        down, up: Kind to A `[L, rank, in]` and B `[L, out, rank]`, float32, trained.
        norms: Name to `[L, C]`, and "norm" to `[C]`, float32, trained.
        dtype: What the model computes in.
        attention: Causal attention of `[B, H, T, D]`.
        checkpoint_from: Sequences of as many tokens keep only what attention needs for the way back, and compute the
            rest again.
    """

    config: Any
    shape: AdapterShape
    base: dict[str, Tensor]
    embedding: Tensor
    down: dict[str, Tensor]
    up: dict[str, Tensor]
    norms: dict[str, Tensor]
    dtype: torch.dtype
    attention: Attention = dense_attention
    checkpoint_from: int = 65_536
    _before: Callable[..., Any] = field(init=False)
    _after: Callable[..., Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self._before, self._after = _before_attention, _after_attention

    @classmethod
    def from_model(cls, model: Any, shape: AdapterShape, dtype: torch.dtype, seed: int = 0) -> AdaptedLlama:
        """A new adapter, which changes nothing yet, around a transformers Llama with tied embeddings."""
        device = model.model.embed_tokens.weight.device
        layers = model.model.layers
        base, down, up = {}, {}, {}
        chance = torch.Generator().manual_seed(seed)
        for kind, part in LINEAR.items():
            weights = [getattr(getattr(layer, part), kind).weight.detach().float() for layer in layers]
            base[kind] = torch.stack(weights)
            count, out, width = base[kind].shape
            # peft's: uniform within 1 / sqrt(in), and zeros.
            bound = 1 / math.sqrt(width)
            drawn = torch.empty(count, shape.rank(kind), width).uniform_(-bound, bound, generator=chance)
            down[kind] = drawn.to(device).requires_grad_()
            up[kind] = torch.zeros(count, out, shape.rank(kind), device=device, requires_grad=True)
        norms = {
            name: torch.stack([getattr(layer, name).weight.detach().float() for layer in layers]) for name in NORMS
        }
        norms["norm"] = model.model.norm.weight.detach().float().clone()
        for weight in norms.values():
            weight.requires_grad_()
        embedding = model.model.embed_tokens.weight.detach().to(dtype)
        return cls(model.config, shape, base, embedding, down, up, norms, dtype)

    def compile(self) -> None:
        """Compile what is around attention, once for all layers; the first steps take longer."""
        self._before, self._after = torch.compile(_before_attention), torch.compile(_after_attention)

    def parameters(self) -> dict[str, Tensor]:
        """All trained parameters by name."""
        named = {f"{kind}.A": weight for kind, weight in self.down.items()}
        named |= {f"{kind}.B": weight for kind, weight in self.up.items()}
        return named | dict(self.norms)

    def merged(self, kind: str) -> Tensor:
        """W + B A of all layers, `[L, out, in]` float32."""
        return torch.baddbmm(self.base[kind], self.up[kind], self.down[kind])

    def hidden(self, ids: Tensor, positions: Tensor) -> Tensor:
        """The last norm's output `[B, T, C]` of `ids` at `positions`, `[B, T]` int64 each."""
        batch, length = ids.shape
        linear = {kind: self.merged(kind).to(self.dtype).unbind(0) for kind in LINEAR}
        norms = {name: self.norms[name].to(self.dtype).unbind(0) for name in NORMS}
        eps = self.config.rms_norm_eps
        cos, sin = self._rope(positions.reshape(-1))
        state = self.embedding[ids.reshape(-1)]
        saves = length >= self.checkpoint_from and torch.is_grad_enabled()
        for layer in range(len(linear["q_proj"])):
            first = [linear[kind][layer] for kind in ("q_proj", "k_proj", "v_proj")]
            inputs = (state, cos, sin, norms["input_layernorm"][layer], *first, self.config.head_dim, eps)
            query, key, value = _run(self._before, inputs, saves)
            groups = query.shape[1] // key.shape[1]
            # Repeated by hand: every kernel takes that, and some take no other.
            repeated = (query, key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1))
            heads = [part.view(batch, length, *part.shape[1:]).transpose(1, 2) for part in repeated]
            mixed = self.attention(*heads).transpose(1, 2).reshape(batch * length, -1)
            last = [linear[kind][layer] for kind in ("o_proj", "gate_proj", "up_proj", "down_proj")]
            inputs = (state, mixed, norms["post_attention_layernorm"][layer], *last, eps)
            state = _run(self._after, inputs, saves)
        return F.rms_norm(state, state.shape[-1:], self.norms["norm"].to(self.dtype), eps).view(batch, length, -1)

    def losses(self, hidden: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What predicting `targets` from `hidden` costs, without all logits at once.

        Args:
            hidden: `[N, C]`.
            targets: `[N]` int64.
            weights: `[N]` float32.

        Returns:
            The weighted sum of the losses, each loss `[N]` without gradient, and whether the target is the first
            choice, `[N]` bool.
        """
        total = torch.zeros((), device=hidden.device)
        losses, right = [], []
        for first in range(0, len(targets), LOGIT_ROWS):
            rows = slice(first, first + LOGIT_ROWS)
            part, loss, hits = checkpoint(
                _chunk_loss,
                hidden[rows],
                self.embedding,
                targets[rows],
                weights[rows],
                use_reentrant=False,
                preserve_rng_state=False,
            )
            total = total + part
            losses.append(loss)
            right.append(hits)
        return total, torch.cat(losses), torch.cat(right)

    def _rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin `[N, 1, D]` of positions `[N]`, as transformers makes them for RoPE without scaling."""
        dim = self.config.head_dim
        exponents = torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim
        angles = positions.float()[:, None] * (1.0 / self.shape.rope_theta**exponents)
        angles = torch.cat((angles, angles), -1)[:, None]
        return angles.cos().to(self.dtype), angles.sin().to(self.dtype)


def _run(step: Callable[..., Any], inputs: tuple[Any, ...], saves: bool) -> Any:
    return checkpoint(step, *inputs, use_reentrant=False, preserve_rng_state=False) if saves else step(*inputs)


def _before_attention(
    state: Tensor, cos: Tensor, sin: Tensor, norm: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, head_dim: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value `[N, heads, D]` of the hidden states `[N, C]`."""
    inputs = F.rms_norm(state, state.shape[-1:], norm, eps)
    query, key, value = (F.linear(inputs, weight).unflatten(-1, (-1, head_dim)) for weight in (wq, wk, wv))
    return _turn(query, cos, sin), _turn(key, cos, sin), value


def _turn(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = heads.chunk(2, -1)
    return heads * cos + torch.cat((-second, first), -1) * sin


def _after_attention(
    state: Tensor, mixed: Tensor, norm: Tensor, wo: Tensor, gate: Tensor, up: Tensor, down: Tensor, eps: float
) -> Tensor:
    """The layer's output `[N, C]` from attention's `[N, H*D]`."""
    state = state + F.linear(mixed, wo)
    inputs = F.rms_norm(state, state.shape[-1:], norm, eps)
    return state + F.linear(F.silu(F.linear(inputs, gate)) * F.linear(inputs, up), down)


def _chunk_loss(hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits = F.linear(hidden, head).float()
    losses = F.cross_entropy(logits, targets, reduction="none")
    return (losses * weights).sum(), losses.detach(), logits.argmax(-1) == targets
