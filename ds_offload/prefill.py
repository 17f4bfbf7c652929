"""A prompt, layer by layer: exact causal attention, K/V and labels leaving as each layer ends."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ds_offload.decoder import DecoderStack
from ds_offload.kv_context import KVContext
from ds_offload.memory.plan import CHUNK_BYTES, chunk_tokens

ProgressCallback = Callable[[str, int, int], None]


def prefill(
    decoder: DecoderStack,
    context: KVContext,
    sequence: int,
    ids: list[int],
    on_progress: ProgressCallback | None = None,
) -> Tensor:
    """Run a prompt through all layers and leave its K/V, labels and window in `context`.

    On the device the prompt's hidden states, its queries and two layers' K/V grow with
    the prompt; nothing grows with the number of layers, and nothing is T x T.

    Args:
        sequence: Which of the context's sequences this is.
        ids: Token ids of the prompt, at least one.
        on_progress: Called with ("prefill", layers done, layers) after each layer.

    Returns:
        Logits `[vocab]` float32 of the prompt's last token.
    """
    length = len(ids)
    context.reserve(sequence, length)
    device = decoder.device
    tokens = torch.tensor(ids, dtype=torch.int64, device=device)
    rope = decoder.rotary(torch.arange(length, device=device))
    hidden = decoder.embed(tokens)
    queries = torch.empty(length, decoder.heads, decoder.head_dim, dtype=hidden.dtype, device=device)
    # Two layers' K/V: one leaves while the next is made.
    staging = [
        torch.empty(decoder.kv_heads, length, 2, decoder.head_dim, dtype=hidden.dtype, device=device) for _ in range(2)
    ]
    step = chunk_tokens(decoder.hidden_size, decoder.intermediate_size, decoder.dtype.itemsize)
    chunks = [slice(start, min(start + step, length)) for start in range(0, length, step)]
    for layer in range(decoder.layers):
        rows = staging[layer % 2]
        context.streams.wait("prompt_rows", layer % 2)
        with context.streams.producing("kv", layer):
            for chunk in chunks:
                query, key, value = decoder.project_qkv(layer, hidden[chunk], (rope[0][chunk], rope[1][chunk]))
                queries[chunk] = query
                rows[:, chunk, 0] = key.transpose(0, 1)
                rows[:, chunk, 1] = value.transpose(0, 1)
        context.write_prompt(layer, sequence, rows)
        causal_attention_(queries, rows, decoder.scaling)
        for chunk in chunks:
            hidden[chunk] = decoder.finish_layer(layer, hidden[chunk], queries[chunk].flatten(1))
        if on_progress is not None:
            _finish(device)
            on_progress("prefill", layer + 1, decoder.layers)
    for parity in range(2):
        context.streams.wait("prompt_rows", parity)
    return decoder.logits(hidden[-1:])[0]


def causal_attention_(queries: Tensor, rows: Tensor, scaling: float) -> None:
    """Exact causal attention of a whole prompt; the result takes the queries' place.

    Args:
        queries: `[T, H, D]`; overwritten with the attention output.
        rows: K and V `[Hkv, T, 2, D]`.
    """
    length, heads, head_dim = queries.shape
    kv_heads = rows.shape[0]
    grouped = queries.view(length, kv_heads, heads // kv_heads, head_dim).permute(1, 2, 0, 3)
    block = max(1, CHUNK_BYTES // (heads // kv_heads * length * head_dim * queries.element_size()))
    for first in range(0, kv_heads, block):
        part = slice(first, first + block)
        query = grouped[part]
        key = rows[part, None, :, 0].expand(-1, query.shape[1], -1, -1)
        value = rows[part, None, :, 1].expand(-1, query.shape[1], -1, -1)
        with _never_quadratic(queries.device):
            out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
        grouped[part] = out


def _never_quadratic(device: torch.device) -> Any:
    """On CUDA, kernels whose memory is linear in T, or an error; never the T x T one."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION])


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
