"""K/V rows at 8 or 4 bits: every layer's code, between the model's rows and those of the store."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ds_offload.kernels.kv_codec import RowCode, RowLayout, decode_rows, encode_rows

# A channel that hardly varies is taken as if it varied by this share of the one that varies most.
_LEAST_SHARE = 2.0**-10


class RowCodec:
    """The codes of some layers' rows; everything runs on the current stream.

    Keys are quantised less their mean, and by the power of two nearest to their standard
    deviation, per layer, KV head and channel: so the query takes the factor over exactly.

    Args:
        layout: The bytes of a row.
        layers: The layers, in the store's order.
        mean, std: Of every layer's keys, `[L, Hkv, D]` float32.
        device: Where rows are encoded and decoded.
    """

    def __init__(
        self, layout: RowLayout, layers: Sequence[int], mean: Tensor, std: Tensor, device: torch.device
    ) -> None:
        self.layout = layout
        self._index = {layer: n for n, layer in enumerate(layers)}
        chosen = list(layers)
        self._mean = mean[chosen].to(device)
        self._factor = channel_factors(std[chosen]).to(device)

    def layer(self, layer: int) -> RowCode:
        """A layer's code; mean and factor `[Hkv, D]`."""
        index = self._index[layer]
        return RowCode(self.layout, self._mean[index], self._factor[index])

    def encode_prompt(self, layer: int, rows: Tensor) -> Tensor:
        """Quantise a layer's rows `[Hkv, n, 2, D]` to `[Hkv, n, 2, P]` uint8."""
        return encode_rows(rows, self._by_head(layer))

    def encode_new(self, rows: Tensor) -> Tensor:
        """Quantise the new token's rows `[layers, B, Hkv, 2, D]` of all layers to `[layers, B, Hkv, 2, P]` uint8."""
        return encode_rows(rows, RowCode(self.layout, self._mean[:, None], self._factor[:, None]))

    def decode(self, layer: int, coded: Tensor, out: Tensor) -> Tensor:
        """Bring a layer's rows `[Hkv, n, 2, P]` back to `out` `[Hkv, n, 2, D]`."""
        return decode_rows(coded, self._by_head(layer), out)

    def _by_head(self, layer: int) -> RowCode:
        code = self.layer(layer)
        return RowCode(self.layout, code.mean[:, None], code.factor[:, None])


def channel_factors(std: Tensor) -> Tensor:
    """Powers of two nearest to standard deviations `[..., D]`; 1 for all of a head where none varies."""
    largest = std.amax(-1, keepdim=True)
    floored = torch.maximum(std, largest * _LEAST_SHARE)
    return torch.where(largest > 0, torch.exp2(torch.log2(floored).round()), 1.0)
