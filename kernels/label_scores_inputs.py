"""What label scores are computed from."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_offload.kernels.label_codec import LabelLayout


class CachedLabels(ABC):
    """Labels of B sequences and a query for each: what scores of labels of every code are computed from."""

    labels: Tensor
    query: Tensor
    starts: Tensor
    lengths: Tensor
    max_length: int
    scaling: float

    @property
    @abstractmethod
    def row_bytes(self) -> int:
        """Bytes of a label."""

    def check(self, channels: Tensor | None = None, shape: tuple[int, ...] = ()) -> None:
        """Refuse arguments that do not fit; `channels`, where the code has them, must have `shape`.

        Raises:
            ValueError: shapes, dtypes or devices do not fit.
        """
        labels, query, row_bytes = self.labels, self.query, self.row_bytes
        if labels.dtype != torch.uint8 or labels.dim() != 3 or labels.shape[2] != row_bytes:
            raise ValueError(f"labels {labels.dtype} {tuple(labels.shape)} must be uint8 [Hkv, N, {row_bytes}]")
        if not query.is_floating_point() or query.dim() != 3:
            raise ValueError(f"query {query.dtype} {tuple(query.shape)} must be floating point [B, H, D]")
        if self.kv_heads < 1 or self.heads < 1 or self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} query heads must be a multiple of the labels' {self.kv_heads} KV heads")
        given: list[tuple[str, Tensor, tuple[int, ...]]] = [
            ("starts", self.starts, (self.batch,)),
            ("lengths", self.lengths, (self.batch,)),
        ]
        if channels is not None:
            given.insert(0, ("channels", channels, shape))
        for name, value, shape in given:
            if value.dtype != torch.int64 or value.shape != shape:
                raise ValueError(f"{name} {value.dtype} {tuple(value.shape)} must be int64 {shape}")
        if self.max_length < 0:
            raise ValueError(f"max_length={self.max_length} must not be negative")
        for name, value in (("query", query), *((name, value) for name, value, _ in given)):
            if value.device != labels.device:
                raise ValueError(f"{name} is on {value.device}; it must be on {labels.device} like the labels")

    @property
    def batch(self) -> int:
        """B."""
        return self.query.shape[0]

    @property
    def heads(self) -> int:
        """H."""
        return self.query.shape[1]

    @property
    def kv_heads(self) -> int:
        """Hkv."""
        return self.labels.shape[0]

    @property
    def group(self) -> int:
        """G, query heads per KV head."""
        return self.heads // self.kv_heads

    def ranges(self) -> list[tuple[int, int]]:
        """(start, length) of every sequence. Waits for the device.

        Raises:
            ValueError: a sequence does not lie within the label cache and max_length.
        """
        ranges = list(zip(self.starts.tolist(), self.lengths.tolist(), strict=True))
        rows = self.labels.shape[1]
        for b, (start, length) in enumerate(ranges):
            if start < 0 or not 0 <= length <= self.max_length or start + length > rows:
                raise ValueError(
                    f"sequence {b}: rows {start} to {start + length} do not fit the cache's {rows} rows "
                    f"and max_length={self.max_length}"
                )
        return ranges

    def check_alignment(self) -> None:
        """Refuse labels that the CUDA kernels, which read rows in vectors, cannot read.

        Raises:
            ValueError: the rows of a head do not stand side by side, or start at odd addresses.
        """
        labels, row_bytes = self.labels, self.row_bytes
        if labels.stride(2) != 1 or labels.stride(1) != row_bytes:
            raise ValueError(f"labels with strides {labels.stride()} must have the rows of a head side by side")
        alignment = math.gcd(16, row_bytes)
        if labels.data_ptr() % alignment or (self.kv_heads > 1 and labels.stride(0) % alignment):
            raise ValueError(
                f"labels at {labels.data_ptr():#x} with {labels.stride(0)} bytes from head to head "
                f"must have every head start at a multiple of {alignment} bytes"
            )

    def result(self, heads: int, out: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor:
        """`out`, or a new tensor, [B, heads, max_length].

        Raises:
            ValueError: the shape, dtype, device or layout of `out` is another one.
        """
        shape, device = (self.batch, heads, self.max_length), self.labels.device
        if out is None:
            return torch.empty(shape, dtype=dtype, device=device)
        if out.dtype != dtype or out.shape != shape or not out.is_contiguous():
            name = str(dtype).removeprefix("torch.")
            raise ValueError(f"out {out.dtype} {tuple(out.shape)} must be {name} {shape}, contiguous")
        if out.device != device:
            raise ValueError(f"out is on {out.device}; it must be on {device} like the labels")
        return out

    def summed_weights(self, scores: Tensor, out: Tensor) -> Tensor:
        """Softmax of scores [B, H, T], summed to `out` [B, Hkv, T]; a sequence at a time, so its bits do not vary."""
        for b, (_, length) in enumerate(self.ranges()):
            out[b, :, :length] = self.head_weights(scores[b, :, :length])
            out[b, :, length:] = 0
        return out

    def head_weights(self, scores: Tensor) -> Tensor:
        """Softmax of one sequence's scores [H, n], summed over every group: [Hkv, n]."""
        return scores.softmax(-1).unflatten(0, (self.kv_heads, -1)).sum(1)


@dataclass(frozen=True)
class ScoreInputs(CachedLabels):
    """The arguments of `label_scores` (kernels/label_scores.py), which describes them.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """

    labels: Tensor
    layout: LabelLayout
    query: Tensor
    channels: Tensor
    starts: Tensor
    lengths: Tensor
    max_length: int
    scaling: float

    def __post_init__(self) -> None:
        self.check(self.channels, (self.labels.shape[0], self.layout.channels))

    @property
    def row_bytes(self) -> int:
        """Bytes of a label."""
        return self.layout.row_bytes

    def kept(self) -> Tensor:
        """The kept channels of the queries: float32 [B, H, R]."""
        index = self.channels.repeat_interleave(self.group, 0)
        return self.query.gather(-1, index.expand(self.batch, -1, -1)).to(torch.float32)
