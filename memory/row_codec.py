"""K/V rows at 8 or 4 bits: every layer's code, between the model's rows and those of the store."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ds_offload.kernels.kv_codec import RowCode, RowLayout, decode_rows, encode_rows


class RowCodec:
    """The codes of some layers' rows; everything runs on the current stream.

    A channel of the keys is divided by a power of two, per layer and KV head, that balances
    what quantising all channels of a row with one step does to scores: the query takes it over
    exactly.

    Args:
        layout: The bytes of a row.
        layers: The layers, in the store's order.
        factor: What every layer's channels of keys are to be divided by, `[L, Hkv, D]` float32.
        device: Where rows are encoded and decoded.
    """

    def __init__(self, layout: RowLayout, layers: Sequence[int], factor: Tensor, device: torch.device) -> None:
        self.layout = layout
        self._index = {layer: n for n, layer in enumerate(layers)}
        self._factor = torch.exp2(torch.log2(factor[list(layers)]).round()).to(device)

    def layer(self, layer: int) -> RowCode:
        """A layer's code; factor `[Hkv, D]`."""
        return RowCode(self.layout, self._factor[self._index[layer]])

    def encode_prompt(self, layer: int, rows: Tensor) -> Tensor:
        """Quantise a layer's rows `[Hkv, n, 2, D]` to `[Hkv, n, 2, P]` uint8."""
        return encode_rows(rows, self._by_head(layer))

    def encode_new(self, layer: int, rows: Tensor) -> Tensor:
        """Quantise a layer's rows of the new token `[B, Hkv, 2, D]` to `[B, Hkv, 2, P]` uint8."""
        return encode_rows(rows, self.layer(layer))

    def decode(self, layer: int, coded: Tensor, out: Tensor) -> Tensor:
        """Bring a layer's rows `[Hkv, n, 2, P]` back to `out` `[Hkv, n, 2, D]`."""
        return decode_rows(coded, self._by_head(layer), out)

    def _by_head(self, layer: int) -> RowCode:
        return RowCode(self.layout, self.layer(layer).factor[:, None])
