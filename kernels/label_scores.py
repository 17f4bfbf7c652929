"""Scores of every cached token from its packed label: which keys a query is likely to need."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_offload.kernels.label_codec import LabelLayout, decode_labels, decode_levels, decode_scales
from ds_offload.kernels.label_scores_inputs import ScoreInputs
from ds_offload.kernels.label_scores_launch import LARGEST_CODE, LEAST_PEAK, launch_scores, launch_weights
from ds_offload.kernels.triton_runtime import launching

# Tokens decoded at a time by the reference: bounds its float32 copy of the labels.
REFERENCE_BLOCK = 1 << 16


def label_scores(
    labels: Tensor,
    layout: LabelLayout,
    query: Tensor,
    channels: Tensor,
    starts: Tensor,
    lengths: Tensor,
    max_length: int,
    scaling: float,
    out: Tensor | None = None,
) -> Tensor:
    """Score each cached token of each sequence against each query head.

    out[b, h, t] = scaling * <q[b, h], decode(labels[h // G, starts[b] + t])> for
    t < lengths[b], and -inf from there to max_length, where q[b, h] is
    query[b, h, channels[h // G]]. A sequence's scores do not depend on the other
    sequences of the batch nor on max_length, bit for bit.

    Below 16 bits q is rounded to whole multiples of its largest magnitude / 127, ties to
    even (`quantise_query`), so its product with the codes is a sum of whole numbers: exact
    below 2 ** 24, which 518 channels of 8 bits stay under. On Gaussian keys and queries of
    28 channels this moves scores by 0.5 % of their root mean square; the rounding of the
    labels moves them by 0.7 % at 8 bits, 9 % at 4 and 36 % at 2.

    Args:
        labels: uint8 [Hkv, N, row_bytes], the label cache; heads may be strided. On CUDA
            the rows of a head stand side by side, and start at a multiple of
            gcd(16, row_bytes) bytes.
        layout: The code of the labels.
        query: [B, H, D] of any float dtype, rotated; may be strided. H is a multiple of Hkv.
        channels: int64 [Hkv, R], the kept channels of each KV head, each below D.
        starts: int64 [B], first row of each sequence in the label cache.
        lengths: int64 [B], tokens of each sequence; starts + lengths <= N.
        max_length: Columns of the result, at least every length.
        scaling: Factor of every score, 1 / sqrt(D) as in the attention.
        out: float32 [B, H, max_length], contiguous.

    Returns:
        float32 [B, H, max_length]: `out` if given; every element is written.

    Raises:
        ValueError: shapes, dtypes, devices or alignment do not fit.
    """
    inputs = ScoreInputs(labels, layout, query, channels, starts, lengths, max_length, scaling)
    return _scores(inputs, inputs.result(inputs.heads, out))


def group_scores(
    labels: Tensor,
    layout: LabelLayout,
    query: Tensor,
    channels: Tensor,
    starts: Tensor,
    lengths: Tensor,
    max_length: int,
    scaling: float,
    out: Tensor | None = None,
    weights: bool = False,
) -> Tensor:
    """Score each cached token of each sequence once per KV head, for its whole group of query heads.

    With G = 1 the result is that of `label_scores`, -inf from lengths[b] on: scores rank
    as their softmax does. With G > 1, or with `weights`, it is the softmax of each head's
    scores over the tokens t < lengths[b], summed over the heads of the group, and 0 from
    lengths[b] on; a sequence without tokens gives zeros. It does not depend on the other
    sequences of the batch nor on max_length, bit for bit.

    On CUDA the scores of heads are never stored: a first pass over the labels leaves the
    sum of every block of tokens, a second one scores again and writes the weights.

    Args:
        labels, layout, query, channels, starts, lengths, max_length, scaling: As in `label_scores`.
        out: float32 [B, Hkv, max_length], contiguous.
        weights: Whether to give weights with G = 1, too.

    Returns:
        float32 [B, Hkv, max_length]: `out` if given; every element is written.

    Raises:
        ValueError: shapes, dtypes, devices or alignment do not fit.
    """
    inputs = ScoreInputs(labels, layout, query, channels, starts, lengths, max_length, scaling)
    out = inputs.result(inputs.kv_heads, out)
    if inputs.group == 1 and not weights:
        return _scores(inputs, out)
    if not labels.is_cuda:
        return inputs.summed_weights(_scores(inputs, inputs.result(inputs.heads, None)), out)
    inputs.check_alignment()
    with launching(labels.device, "group_scores"):
        launch_weights(inputs, out)
    return out


def _scores(inputs: ScoreInputs, out: Tensor) -> Tensor:
    """Fill `out` with the scores of every head."""
    if inputs.labels.is_cuda:
        inputs.check_alignment()
        with launching(out.device, "label_scores"):
            launch_scores(inputs, out)
        return out
    if inputs.layout.bits == 16:
        return _reference(inputs, out)
    # Loads Numba, which takes a second: at first use.
    from ds_offload.kernels.label_scores_cpu import scores_from_bytes

    inputs.ranges()
    codes, factors = quantise_query(inputs.kept(), inputs.layout, inputs.scaling)
    scores_from_bytes(inputs, codes, factors, out)
    return out


def quantise_query(kept: Tensor, layout: LabelLayout, scaling: float) -> tuple[Tensor, Tensor]:
    """Queries as whole numbers.

    Args:
        kept: float32 [..., R], the kept channels.
        layout: The code of the labels, of fewer than 16 bits.
        scaling: Factor of every score.

    Returns:
        The codes, whole numbers from -127 to 127 as float32 [..., R]; and float32
        [...], the factor that makes a score of sum of code * (2c - n), but for the
        label's scale.
    """
    peak = kept.abs().amax(-1, keepdim=True).clamp_(min=LEAST_PEAK)
    # A number over a tensor would be rounded twice.
    codes = (kept * (torch.full_like(peak, LARGEST_CODE) / peak)).round_()
    return codes, peak[..., 0] * (scaling / (LARGEST_CODE * layout.largest))


def label_scores_reference(
    labels: Tensor,
    layout: LabelLayout,
    query: Tensor,
    channels: Tensor,
    starts: Tensor,
    lengths: Tensor,
    max_length: int,
    scaling: float,
    out: Tensor | None = None,
) -> Tensor:
    """`label_scores` in torch: unpack, then one product per sequence. Waits for the device."""
    inputs = ScoreInputs(labels, layout, query, channels, starts, lengths, max_length, scaling)
    return _reference(inputs, inputs.result(inputs.heads, out))


def group_scores_reference(
    labels: Tensor,
    layout: LabelLayout,
    query: Tensor,
    channels: Tensor,
    starts: Tensor,
    lengths: Tensor,
    max_length: int,
    scaling: float,
    out: Tensor | None = None,
    weights: bool = False,
) -> Tensor:
    """`group_scores` in torch. Waits for the device."""
    inputs = ScoreInputs(labels, layout, query, channels, starts, lengths, max_length, scaling)
    out = inputs.result(inputs.kv_heads, out)
    if inputs.group == 1 and not weights:
        return _reference(inputs, out)
    return inputs.summed_weights(_reference(inputs, inputs.result(inputs.heads, None)), out)


def _reference(inputs: ScoreInputs, out: Tensor) -> Tensor:
    layout, query = inputs.layout, inputs.kept()
    if layout.bits == 16:
        query *= inputs.scaling
    else:
        query, factors = quantise_query(query, layout, inputs.scaling)
        factors = factors.view(inputs.batch, inputs.kv_heads, inputs.group, 1)
    for b, (start, length) in enumerate(inputs.ranges()):
        grouped, scores = (value.unflatten(0, (inputs.kv_heads, -1)) for value in (query[b], out[b]))
        for first in range(0, length, REFERENCE_BLOCK):
            last = min(length, first + REFERENCE_BLOCK)
            rows = inputs.labels[:, start + first : start + last]
            if layout.bits == 16:
                scores[..., first:last] = grouped @ decode_labels(rows, layout).mT
            else:
                sums = grouped @ decode_levels(rows, layout).mT
                scores[..., first:last] = sums * factors[b] * decode_scales(rows[..., -1])[:, None]
        scores[..., length:] = -torch.inf
    return out
