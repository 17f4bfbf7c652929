"""What labels are: the codes of all layers, and what is done with each."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ds_offload.kernels.label_codec import LabelLayout, encode_labels
from ds_offload.kernels.label_scores import group_scores
from ds_offload.kernels.new_token import LabelRows
from ds_offload.kernels.product_code import ProductCode, ProductRows, encode_product
from ds_offload.kernels.product_scores import product_scores


class LabelCode(Protocol):
    """A code of labels.

    Attributes:
        layers, kv_heads: Whose codes it has.
        row_bytes: Bytes of a label.
    """

    layers: int
    kv_heads: int
    row_bytes: int

    def encode(self, layer: int, keys: Tensor, out: Tensor) -> None:
        """Write the labels of keys `[Hkv, n, D]` of any float dtype to uint8 `[Hkv, n, row_bytes]`."""
        ...

    def new_rows(self, layer: int, rows: Tensor, starts: Tensor) -> LabelRows | ProductRows:
        """A layer's labels `[Hkv, N, row_bytes]`, as the kernel that labels a new token wants them."""
        ...

    def scores(
        self,
        layer: int,
        rows: Tensor,
        query: Tensor,
        starts: Tensor,
        lengths: Tensor,
        max_length: int,
        scaling: float,
        weights: bool,
        order: bool,
    ) -> Tensor:
        """Scores of a layer's labels; see `LabelCache.scores`."""
        ...


class ScalarLabels:
    """A few channels of every key less their mean over the calibration text, quantised one by one (`LabelCode`).

    The mean adds the same to every score of a query, so it changes no ranking.

    Args:
        layout: The code.
        channels: Channels in descending importance, `[L, Hkv, D]` int64; the first R are kept.
        key_mean: Mean key `[L, Hkv, D]` float32.
        device: Where the labels live.
    """

    def __init__(self, layout: LabelLayout, channels: Tensor, key_mean: Tensor, device: torch.device) -> None:
        self.layout = layout
        self.row_bytes = layout.row_bytes
        self.layers, self.kv_heads, _ = channels.shape
        kept = channels[..., : layout.channels].contiguous()
        self._channels = kept.to(device)
        self._mean = key_mean.gather(-1, kept).to(device)

    def encode(self, layer: int, keys: Tensor, out: Tensor) -> None:
        """Write the labels of keys `[Hkv, n, D]` of any float dtype to uint8 `[Hkv, n, row_bytes]`."""
        kept = keys.gather(-1, self._channels[layer][:, None].expand(-1, keys.shape[1], -1))
        encode_labels(kept.float() - self._mean[layer][:, None], self.layout, out=out)

    def new_rows(self, layer: int, rows: Tensor, starts: Tensor) -> LabelRows:
        """A layer's labels `[Hkv, N, row_bytes]`, as the kernel that takes in a new token wants them."""
        return LabelRows(rows, self.layout, self._channels[layer], self._mean[layer], starts)

    def scores(
        self,
        layer: int,
        rows: Tensor,
        query: Tensor,
        starts: Tensor,
        lengths: Tensor,
        max_length: int,
        scaling: float,
        weights: bool,
        order: bool,
    ) -> Tensor:
        """Scores of a layer's labels; see `LabelCache.scores`."""
        return group_scores(
            *(rows, self.layout, query, self._channels[layer], starts, lengths, max_length, scaling), weights=weights
        )


class ProductLabels:
    """Every key by the nearest words of its parts (`LabelCode`).

    Args:
        codes: Of all layers.
        device: Where the labels live.
    """

    def __init__(self, codes: ProductCode, device: torch.device) -> None:
        self._codes = codes.to(device)
        self.layers, self.kv_heads, _ = codes.mean.shape
        self.row_bytes = codes.layout.row_bytes

    def encode(self, layer: int, keys: Tensor, out: Tensor) -> None:
        """Write the labels of keys `[Hkv, n, D]` of any float dtype to uint8 `[Hkv, n, row_bytes]`."""
        encode_product(keys, self._codes.layer(layer), out)

    def new_rows(self, layer: int, rows: Tensor, starts: Tensor) -> ProductRows:
        """A layer's labels `[Hkv, N, row_bytes]`, as the kernel that labels a new token wants them."""
        return ProductRows(rows, self._codes.layer(layer), starts)

    def scores(
        self,
        layer: int,
        rows: Tensor,
        query: Tensor,
        starts: Tensor,
        lengths: Tensor,
        max_length: int,
        scaling: float,
        weights: bool,
        order: bool,
    ) -> Tensor:
        """Scores of a layer's labels; see `LabelCache.scores`."""
        code = self._codes.layer(layer)
        whole = order and not weights
        return product_scores(rows, code, query, starts, lengths, max_length, scaling, weights=weights, whole=whole)
