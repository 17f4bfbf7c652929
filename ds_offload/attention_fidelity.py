"""How near a decode step's sparse attention came to exact attention of the same query over the whole store."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ds_offload.decoder import DecoderStack
from ds_offload.kernels.select import select_tokens
from ds_offload.kv_context import KVContext
from ds_offload.memory.workspace import compared_tokens
from ds_offload.prefetch.selection import Step
from ds_offload.stored_blocks import StoredBlocks


@dataclass(frozen=True)
class AttentionFidelity:
    """What one layer's sparse attention of one token captured.

    Attributes:
        attention_mass: Exact attention weight of the attended tokens, mean over query heads.
        best_mass: The same of the best selection of as many tokens: the exact top-k of a KV head.
        window_mass: The same of sinks, recent window and current token, which are always attended.
        output_error: |sparse - exact| / |exact| of the output, mean over query heads.
        selection_recall: Share of that exact top-k that was selected; None where nothing is selected.
    """

    attention_mass: float
    best_mass: float
    window_mass: float
    output_error: float
    selection_recall: float | None


FIGURES = ("attention_mass", "best_mass", "window_mass", "output_error", "selection_recall")


class FidelitySums:
    """Sums of `AttentionFidelity` by layer.

    Attributes:
        comparisons: How many were added.
    """

    def __init__(self, layers: int) -> None:
        self.comparisons = 0
        self._values: dict[str, list[list[float]]] = {name: [[] for _ in range(layers)] for name in FIGURES}

    def add(self, layer: int, fidelity: AttentionFidelity) -> None:
        """Count one comparison of a layer in; figures that it does not have are left out."""
        self.comparisons += 1
        for name, layers in self._values.items():
            value = getattr(fidelity, name)
            if value is not None:
                layers[layer].append(value)

    def figures(self) -> dict[str, Any]:
        """Each figure's mean over the layers that have it, and `layers`: those of every layer; None without any."""
        layers = {name: [_mean(values) for values in each] for name, each in self._values.items()}
        means = {name: _mean([value for value in each if value is not None]) for name, each in layers.items()}
        return {**means, "layers": layers}


@torch.no_grad()
def compare_attention(
    decoder: DecoderStack, context: KVContext, step: Step, layer: int, sequence: int, length: int
) -> AttentionFidelity:
    """Compare a layer's attention of the last step, in float32; waits for the device.

    Between two steps, on the stream that steps run on. Reads all K/V that the store has of
    the layer and sequence through buffers of a few MiB; changes nothing that a step reads.

    Args:
        step: The last one, with the values it had.
        layer: One whose K/V are in the store.
        length: Tokens of the sequence, the current one included.
    """
    attended, window = context.attended[layer], context.window
    context.streams.join()
    one = step.of(sequence)
    mine = slice(sequence, sequence + 1)
    # Labels of earlier tokens stay as they are, so this is the selection that was attended to, bit for bit.
    selection = context.scheduler.selector.of(sequence).select(layer, attended.selected_by[mine], one)
    tokens, keep = selection.tokens[0], selection.keep
    del selection
    query = attended.query[sequence].float().unflatten(0, (decoder.kv_heads, -1))
    size = min(length, compared_tokens(decoder.kv_heads, context.store.row_bytes))
    blocks = StoredBlocks(decoder, context, sequence, size)
    weights, exact = exact_attention(query, blocks.after_step(layer, length), step.max_length, decoder.scaling)
    del blocks
    grouped = weights.sum(1)
    del weights
    best = select_tokens(grouped[None], window.sinks, one.past, keep, step.most_kept)[0] if step.most_kept else tokens
    first = max(window.sinks, length - window.ring)
    forced = grouped[:, : min(window.sinks, length)].sum(-1) + grouped[:, first:length].sum(-1)
    output = attended.output[sequence].float().view_as(exact)
    error = ((output - exact).norm(dim=-1) / exact.norm(dim=-1)).mean()
    chosen = (_weight_of(grouped, tokens), _weight_of(grouped, best), torch.zeros_like(forced))
    masses = [(forced + weight).mean() / query.shape[1] for weight in chosen]
    found, there = _common(tokens, best, step.max_length)
    figures = torch.stack([*masses, error, found.float(), there.float()])
    mass, best_mass, window_mass, output_error, hits, count = figures.tolist()
    return AttentionFidelity(mass, best_mass, window_mass, output_error, hits / count if count else None)


def compare_step(decoder: DecoderStack, context: KVContext, step: Step, lengths: list[int], sums: FidelitySums) -> None:
    """Compare every layer of the last step, for every sequence; see `compare_attention`."""
    for layer in context.attended:
        for sequence, length in enumerate(lengths):
            sums.add(layer, compare_attention(decoder, context, step, layer, sequence, length))


def exact_attention(query: Tensor, blocks: Iterable[Tensor], width: int, scaling: float) -> tuple[Tensor, Tensor]:
    """Attention of one token over rows that come block by block.

    Args:
        query: `[Hkv, G, D]` float32.
        blocks: K and V of tokens in order, `[Hkv, n, 2, D]` of any float dtype; one is read before the next is taken.
        width: At least the tokens of all blocks.

    Returns:
        The weights `[Hkv, G, width]`, 0 beyond the tokens, and the output `[Hkv, G, D]`, both float32.
    """
    scores = torch.full((*query.shape[:2], width), -torch.inf, device=query.device)
    highest = scores.new_full((*query.shape[:2], 1), -torch.inf)
    total, output, begin = torch.zeros_like(highest), torch.zeros_like(query), 0
    for rows in blocks:
        part = scores[..., begin : begin + rows.shape[1]]
        torch.mul(query @ rows[:, :, 0].float().transpose(-1, -2), scaling, out=part)
        begin += rows.shape[1]
        higher = torch.maximum(highest, part.amax(-1, keepdim=True))
        shrink, weights = (highest - higher).exp(), (part - higher).exp()
        total = total * shrink + weights.sum(-1, keepdim=True)
        output = output * shrink + weights @ rows[:, :, 1].float()
        highest = higher
    return scores.sub_(highest + total.log()).exp_(), output / total


def _weight_of(weights: Tensor, tokens: Tensor) -> Tensor:
    """Sums `[Hkv]` of weights `[Hkv, T]` over tokens `[Hkv, K]`, -1 for padding."""
    return weights.gather(1, tokens.clamp(min=0)).masked_fill(tokens < 0, 0).sum(-1)


def _common(tokens: Tensor, best: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """How many of `best` `[Hkv, K]` are among `tokens` `[Hkv, K]`, and how many there are; -1 is padding."""
    chosen = torch.zeros(len(tokens), width + 1, dtype=torch.bool, device=tokens.device)
    chosen.scatter_(1, torch.where(tokens < 0, width, tokens), True)
    there = best >= 0
    return (chosen.gather(1, best.clamp(min=0)) & there).sum(), there.sum()


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
