"""One decode step: every layer of the newest token of each sequence, prefetching one layer ahead."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_offload.decoder import DecoderStack
from ds_offload.kv_context import KVContext
from ds_offload.prefetch.query_predictor import QueryPredictor


def decode_step(decoder: DecoderStack, context: KVContext, tokens: list[int], lengths: list[int]) -> Tensor:
    """Logits of the next token of each sequence.

    Args:
        tokens: The newest token of each of the B sequences; its K/V join the context.
        lengths: Tokens of each context, the newest included.

    Returns:
        `[B, vocab]` float32.
    """
    step = context.begin_step(lengths)
    predictor = QueryPredictor(decoder.project_query)
    scheduler = context.scheduler
    rope = decoder.rotary_each([length - 1 for length in lengths])
    hidden = decoder.embed(torch.tensor(tokens, dtype=torch.int64, device=decoder.device))
    for layer in range(decoder.layers):
        if layer + 1 < decoder.layers and scheduler.wants_prediction(layer + 1):
            scheduler.start(layer + 1, lambda layer=layer, hidden=hidden: predictor.predict(layer, hidden, rope))
        query, key, value = decoder.project_qkv(layer, hidden, rope)
        context.append(layer, key, value, step)
        attention = context.attend(layer, query, lengths)
        hidden = decoder.finish_layer(layer, hidden, attention.flatten(1))
    return decoder.logits(hidden)
