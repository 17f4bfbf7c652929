"""Scores of every cached token from its product code: which keys a query is likely to need."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_offload.kernels.label_scores_inputs import CachedLabels
from ds_offload.kernels.product_code import PART, WORDS, ProductCode, unpack_parts
from ds_offload.kernels.product_scores_launch import (
    HIGHEST,
    LEAST_RANGE,
    OCTAVE,
    launch_scores,
    launch_weights,
    product_launch,
)
from ds_offload.kernels.triton_runtime import launching

# Tokens looked up at a time by the reference: bounds its numbers of all parts.
REFERENCE_BLOCK = 1 << 14


@dataclass(frozen=True)
class ProductInputs(CachedLabels):
    """The arguments of `product_scores`, which describes them.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """

    labels: Tensor
    code: ProductCode
    query: Tensor
    starts: Tensor
    lengths: Tensor
    max_length: int
    scaling: float

    def __post_init__(self) -> None:
        self.check()
        kv_heads, head_dim = self.code.mean.shape
        if (kv_heads, head_dim) != (self.kv_heads, self.query.shape[2]):
            raise ValueError(
                f"a code of {kv_heads} KV heads of {head_dim} channels does not fit labels of {self.kv_heads} KV heads "
                f"and a query {tuple(self.query.shape)}"
            )
        if self.code.mean.device != self.labels.device:
            raise ValueError(
                f"the code is on {self.code.mean.device}; it must be on {self.labels.device} like the labels"
            )

    @property
    def row_bytes(self) -> int:
        """Bytes of a label."""
        return self.code.layout.row_bytes


def product_scores(
    labels: Tensor,
    code: ProductCode,
    query: Tensor,
    starts: Tensor,
    lengths: Tensor,
    max_length: int,
    scaling: float,
    out: Tensor | None = None,
    weights: bool = False,
    whole: bool = False,
) -> Tensor:
    """Score each cached token of each sequence once per KV head, for its whole group of query heads.

    A head's score of a token is scaling * <q[b, h], decode(label)>, with the numbers that a
    part's words add to it rounded to 8 bits, or to 6 where three or four heads share a look-up (`query_tables`).
    On Gaussian keys and queries of 64 channels that moves scores by 1 or 4 % of their root mean square, the code
    itself by 40 %. With G = 1 these are the result, -inf from lengths[b] on. With G > 1, or with `weights`,
    it is the softmax of each head's scores over the tokens t < lengths[b], summed over the
    heads of the group, and 0 from lengths[b] on. It does not depend on the other sequences
    of the batch nor on max_length, bit for bit.

    On CUDA weights take one pass over the labels: it leaves every head's sums in 16 bits
    and the sum of every block of tokens' softmaxes, and a second pass reads those.

    Args:
        labels: uint8 [Hkv, N, row_bytes], the label cache; heads may be strided. On CUDA
            the rows of a head stand side by side, and start at a multiple of
            gcd(16, row_bytes) bytes.
        code: The layer's code, on the same device.
        query: [B, H, D] of any float dtype, rotated; may be strided. H is a multiple of Hkv.
        starts: int64 [B], first row of each sequence in the label cache.
        lengths: int64 [B], tokens of each sequence; starts + lengths <= N.
        max_length: Columns of the result, at least every length.
        scaling: Factor of every score, 1 / sqrt(D) as in the attention.
        out: float32, or int16 if `whole`, [B, Hkv, max_length], contiguous.
        weights: Whether to give weights with G = 1, too.
        whole: Give whole numbers that order a head's tokens as their scores or weights do: int16, and -1 from
            lengths[b] on. Of scores, those that they are a step's multiples of, 0 to 255 P. Of weights w their
            logarithms, 240 to an octave: 32640 + 240 log2(w / G), rounded down, at least 0.

    Returns:
        float32 or int16 [B, Hkv, max_length]: `out` if given; every element is written.

    Raises:
        ValueError: shapes, dtypes, devices or alignment do not fit.
    """
    inputs = ProductInputs(labels, code, query, starts, lengths, max_length, scaling)
    summed = inputs.group > 1 or weights
    out = inputs.result(inputs.kv_heads, out, torch.int16 if whole else torch.float32)
    if labels.is_cuda:
        inputs.check_alignment()
        with launching(labels.device, "product_scores"):
            (launch_weights if summed else launch_scores)(inputs, out)
        return out
    # Loads Numba, which takes a second: at first use.
    from ds_offload.kernels.label_scores_cpu import score_bytes

    inputs.ranges()
    numbers, steps, offsets = query_tables(inputs)
    if whole and not summed:
        steps, offsets = torch.ones_like(steps), torch.zeros_like(offsets)
    scores = inputs.result(inputs.heads, None) if summed or whole else out
    score_bytes(inputs, _byte_tables(numbers).numpy(), steps, offsets, torch.ones(256), scores)
    if summed:
        return _summed_weights(inputs, scores, out)
    return out.copy_(scores.clamp_(min=-1)) if whole else out


def product_scores_reference(
    labels: Tensor,
    code: ProductCode,
    query: Tensor,
    starts: Tensor,
    lengths: Tensor,
    max_length: int,
    scaling: float,
    out: Tensor | None = None,
    weights: bool = False,
    whole: bool = False,
) -> Tensor:
    """`product_scores` in torch: the numbers of every token's words, summed. Waits for the device."""
    inputs = ProductInputs(labels, code, query, starts, lengths, max_length, scaling)
    summed = inputs.group > 1 or weights
    out = inputs.result(inputs.kv_heads, out, torch.int16 if whole else torch.float32)
    scores = inputs.result(inputs.heads, None) if summed else out
    numbers, steps, offsets = query_tables(inputs)
    tables = numbers.unflatten(1, (inputs.kv_heads, inputs.group))
    for b, (start, length) in enumerate(inputs.ranges()):
        for first in range(0, length, REFERENCE_BLOCK):
            last = min(first + REFERENCE_BLOCK, length)
            words = unpack_parts(labels[:, start + first : start + last], code.layout)
            index = words.mT[:, None].expand(-1, inputs.group, -1, -1)
            sums = tables[b].gather(-1, index).sum(-2).flatten(0, 1)
            as_they_are = scores.dtype == torch.int16
            scores[b, :, first:last] = sums if as_they_are else sums * steps[b, :, None] + offsets[b, :, None]
        scores[b, :, length:] = -1 if scores.dtype == torch.int16 else -torch.inf
    return _summed_weights(inputs, scores, out) if summed else out


def _summed_weights(inputs: ProductInputs, scores: Tensor, out: Tensor) -> Tensor:
    """Softmax of scores [B, H, T], summed to `out` [B, Hkv, T]; an int16 `out` takes their logarithms."""
    if out.dtype != torch.int16:
        return inputs.summed_weights(scores, out)
    for b, (_, length) in enumerate(inputs.ranges()):
        weights = inputs.head_weights(scores[b, :, :length])
        numbers = (weights.log2_() - math.log2(inputs.group)).mul_(OCTAVE).add_(HIGHEST)
        out[b, :, :length] = numbers.clamp_(0, HIGHEST)
        out[b, :, length:] = -1
    return out


def query_tables(inputs: ProductInputs) -> tuple[Tensor, Tensor, Tensor]:
    """What each word of each part adds to a head's score, as whole numbers from 0 to `ProductLaunch.largest`.

    Returns:
        The numbers float32 [B, H, P, 16]; and float32 [B, H] each, the step and the offset
        that make a score of their sum: step * sum + offset. Steps are the largest range
        of any part / the largest number, offsets the sum of the parts' least values.
    """
    code, largest = inputs.code, product_launch(inputs.code.layout, inputs.group).largest
    queries = inputs.query.to(torch.float32).unflatten(1, (inputs.kv_heads, inputs.group)) * inputs.scaling
    values = torch.empty(inputs.batch, inputs.heads, code.layout.parts, WORDS, device=queries.device)
    # A sequence at a time: the bits of a product vary with its size.
    for query, out in zip(queries, values, strict=True):
        turned = torch.matmul(query, code.turn.mT).unflatten(-1, (code.layout.parts, PART))
        out.copy_((turned.transpose(1, 2) @ code.words.mT).transpose(1, 2).flatten(0, 1))
    least = values.amin(-1)
    values = values - least[..., None]
    peak = values.amax((-2, -1)).clamp_(min=LEAST_RANGE)
    numbers = (values * (largest / peak)[..., None, None]).add_(0.5).floor_().clamp_(max=largest)
    return numbers, peak / largest, least.sum(-1)


def _byte_tables(numbers: Tensor) -> Tensor:
    """Numbers [B, H, P, 16] of two parts to a byte: float32 [B * H, ceil(P / 2), 256]."""
    pairs = torch.nn.functional.pad(numbers.flatten(0, 1), (0, 0, 0, numbers.shape[2] % 2)).unflatten(1, (-1, 2))
    return (pairs[:, :, 1, :, None] + pairs[:, :, 0, None, :]).flatten(2).contiguous()
