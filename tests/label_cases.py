"""Packed labels with queries for them, and their scores from the definition, in float64."""

from __future__ import annotations

import torch

from ds_offload.kernels.label_codec import LabelLayout, decode_labels, decode_levels, encode_labels

Case = tuple[torch.Tensor, LabelLayout, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def label_case(channels: int, bits: int, kv_heads: int, group: int, lengths: list[int], seed: int = 0) -> Case:
    """Labels of sequences one after the other, three rows apart, a query for each, and channels in any order.

    The first six arguments of `label_scores`; the head dim is a few more than the channels.
    """
    generator = torch.Generator().manual_seed(seed)
    layout = LabelLayout(channels, bits)
    starts = [3 + sum(lengths[:n]) + 3 * n for n in range(len(lengths))]
    capacity = starts[-1] + lengths[-1] + 2
    labels = encode_labels(torch.randn(kv_heads, capacity, channels, generator=generator), layout)
    head_dim = channels + 5
    query = torch.randn(len(lengths), kv_heads * group, head_dim, generator=generator)
    kept = torch.stack([torch.randperm(head_dim, generator=generator)[:channels] for _ in range(kv_heads)])
    return labels, layout, query, kept, torch.tensor(starts), torch.tensor(lengths)


def to_cuda(case: Case) -> Case:
    """The same case on the GPU."""
    labels, layout, *others = case
    query, channels, starts, lengths = (value.cuda() for value in others)
    return labels.cuda(), layout, query, channels, starts, lengths


def kept_query(case: Case, b: int, head: int) -> torch.Tensor:
    """The kept channels of one query head, float32 [R]."""
    labels, _, query, channels, _, _ = case
    return query[b, head, channels[head // (query.shape[1] // len(labels))]].float()


def exact_scores(case: Case, max_length: int, scaling: float, *, rounded: bool = True) -> torch.Tensor:
    """Scores float64 [B, H, max_length]; with `rounded` of the query that labels below 16 bits are taken with."""
    labels, layout, query, _, starts, lengths = case
    if layout.bits == 16:
        keys = decode_labels(labels, layout).double()
    else:
        scale = 2 ** ((labels[..., -1:].double() - 128) / 12)
        keys = decode_levels(labels, layout).double() / layout.largest * scale
    group = query.shape[1] // len(labels)
    out = torch.full((*query.shape[:2], max_length), -torch.inf, dtype=torch.float64)
    for b, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        for head in range(query.shape[1]):
            q = kept_query(case, b, head)
            if rounded and layout.bits < 16:
                step = q.abs().max().double() / 127
                # In float32, as it is defined: a tie may fall to the other side in float64, or if the quotient is
                # rounded twice, as torch does with a number over a tensor.
                q = (q * (torch.tensor(127.0) / q.abs().max())).round().double() * step
            out[b, head, :length] = keys[head // group, start : start + length] @ q.double() * scaling
    return out


def exact_weights(case: Case, max_length: int, scaling: float) -> torch.Tensor:
    """Softmax of `exact_scores` over the tokens, summed over each group: float64 [B, Hkv, max_length]."""
    scores = exact_scores(case, max_length, scaling)
    weights = torch.where((case[5] > 0)[:, None, None], scores.softmax(-1), 0.0)
    return weights.unflatten(1, (len(case[0]), -1)).sum(2)
