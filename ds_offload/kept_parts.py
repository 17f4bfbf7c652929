"""What must be kept of a layer's tokens to go on with them later, and what is made again of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ds_offload.kv_context import KVContext

# Tokens whose labels are made again at a time.
RESTORED_TOKENS = 4096


class KeptPart(NamedTuple):
    """A tensor to be kept: its name, dtype and shape, and the contiguous parts that it lies in, in order."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: Iterator[Tensor]


def kept_parts(context: KVContext, layer: int, sequence: int, tokens: int) -> Iterator[KeptPart]:
    """What is to be kept of a layer's tokens 0 to `tokens`: "layer", the stored rows, where they lie.

    Of quantised rows also "labels" and "window", which were made before they were.
    """
    dtype, shape = context.stored_as(layer, tokens)
    yield KeptPart("layer", dtype, shape, context.row_parts(layer, sequence, tokens))
    if context.codec is None or layer not in context.store:
        return
    window, labels = context.window_buffer, context.labels
    assert window is not None, "quantised rows have their window apart"
    size = (shape[0], tokens, labels.code.row_bytes)
    yield KeptPart("labels", torch.uint8, size, labels.parts(layer, sequence, tokens))
    rows = window.tensor(layer)
    yield KeptPart("window", rows.dtype, tuple(rows.shape[1:]), window.parts(layer, sequence))


def restore_parts(context: KVContext, layer: int, sequence: int, tokens: int) -> None:
    """Make what `kept_parts` does not give, when the tensors that it gives have been filled."""
    if context.codec is not None or layer not in context.store:
        return
    dtype, shape = context.stored_as(layer, tokens)
    for start in range(0, tokens, RESTORED_TOKENS):
        size = (shape[0], min(RESTORED_TOKENS, tokens - start), *shape[2:])
        rows = torch.empty(size, dtype=dtype, device=context.store.device)
        context.read_rows(layer, sequence, start, rows)
        context.restore_prompt(layer, sequence, rows, start)
