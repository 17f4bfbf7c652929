"""A prompt's hidden states between two layers: on the device, or on the host for a prompt too long for it."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_offload.decoder import DecoderStack
from ds_offload.memory.pinned_pool import PinnedPool


class HiddenStates:
    """Hidden states `[T, hidden]` of the model's dtype; use as a context manager.

    On the host they lie in page-locked memory, where the driver allows it, and pass the device a piece at a time, on
    the compute stream: a piece must be saved before it is loaded again. Who reads `whole`
    waits for the device first.

    Args:
        on_host: Whether they lie on the host while a CUDA device computes.

    Attributes:
        whole: All of them, where they lie.
    """

    def __init__(self, decoder: DecoderStack, tokens: int, on_host: bool) -> None:
        self._device = decoder.device
        self._pool: PinnedPool | None = None
        shape = (tokens, decoder.hidden_size)
        if on_host and decoder.device.type == "cuda":
            self._pool = PinnedPool(
                decoder.device, "the prompt's hidden states stay pageable, and the prefill waits for their copies"
            )
            try:
                block = self._pool.allocate(tokens * decoder.hidden_size * decoder.dtype.itemsize)
            except BaseException:
                self._pool.close()
                raise
            self.whole = block.view(decoder.dtype).view(shape)
        else:
            self.whole = torch.empty(shape, dtype=decoder.dtype, device=decoder.device)

    def __enter__(self) -> HiddenStates:
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.close()

    def load(self, piece: slice) -> Tensor:
        """A piece on the device, to be changed there and then saved."""
        return self.whole[piece].to(self._device, non_blocking=True)

    def save(self, piece: slice, hidden: Tensor) -> None:
        """Keep what `load` gave, or other states of the piece's shape."""
        kept = self.whole[piece]
        if kept.data_ptr() != hidden.data_ptr():
            kept.copy_(hidden, non_blocking=True)
