"""A context of one sequence taken back to fewer tokens, or copied to another context."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_offload.kv_context import KVContext


def rewind(context: KVContext, tokens: int, window: dict[int, Tensor] | None = None) -> bool:
    """Forget all tokens from number `tokens` on: what is added next takes their places.

    Rows and labels behind the end are never read. Slots of the hot set may hold rows of
    tokens that come again as others, and the ring of recent tokens has lost those that
    they overwrote, which are brought back from the store. A store of quantised rows does
    not have them as they were.

    Args:
        window: What `copy_window` gave when the context had `tokens` tokens.

    Returns:
        Whether sinks and recent tokens are on the device again; if not they are to be read again.
    """
    # Behind whatever reads slots, and whatever writes the rows that are read back.
    context.streams.join()
    if context.hot_set is not None:
        context.hot_set.forget()
    if context.codec is None:
        fill_window(context, tokens)
        return True
    if window is not None:
        assert context.window_buffer is not None, "quantised rows have their window apart"
        context.window_buffer.restore(window)
    return window is not None or not tokens


def copy_window(context: KVContext) -> dict[int, Tensor] | None:
    """A copy of sinks and recent tokens on the device, where the store has them quantised only; None elsewhere."""
    if context.codec is None or context.window_buffer is None:
        return None
    context.streams.join()
    return context.window_buffer.copy()


def fill_window(context: KVContext, tokens: int) -> None:
    """Bring sinks and recent window of a sequence of `tokens` tokens on the device, from a store of plain rows."""
    store, window = context.store, context.window
    if context.window_buffer is None:
        return
    for first, last in ((0, min(window.sinks, tokens)), (max(0, tokens - window.ring), tokens)):
        for layer in range(context.layers):
            if layer in store and first < last:
                rows = torch.empty(store.prompt_shape(last - first), dtype=store.dtype, device=store.device)
                store.read(layer, 0, first, rows)
                context.window_buffer.fill(layer, 0, rows, first)


def copy_context(target: KVContext, source: KVContext, tokens: int) -> None:
    """Give `target`, which is new and of the same shape, the first `tokens` tokens of `source`.

    Whole segments of the store are shared until one of the two writes to them; what
    follows, labels and rows on the device are copied. Waits for the device.
    """
    source.streams.join()
    synchronize(source)
    target.budget_state = source.budget_state
    target.store.share(source.store, 0, tokens)
    target.reserve(0, tokens)
    for layer in range(source.layers):
        if layer not in source.store:
            rows = zip(target.row_parts(layer, 0, tokens), source.row_parts(layer, 0, tokens), strict=True)
            for to, of in rows:
                to.copy_(of)
    target.labels.rows[:, :, :tokens].copy_(source.labels.rows[:, :, :tokens])
    if target.hot_set is not None and source.hot_set is not None:
        target.hot_set.copy_from(source.hot_set)
    window = copy_window(source)
    if window is not None and target.window_buffer is not None:
        # The hot set has none of these.
        target.window_buffer.restore(window)


def own_from(context: KVContext, start: int) -> None:
    """Let tokens be written from number `start` on, where other contexts may share their segments."""
    if context.store.shares(0, start):
        context.streams.join()
        synchronize(context)
        context.store.unshare(0, start)


def synchronize(context: KVContext) -> None:
    """Wait for the device, so that the host may read and write rows."""
    if context.store.device.type == "cuda":
        torch.cuda.synchronize(context.store.device)
