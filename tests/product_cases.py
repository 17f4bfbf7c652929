"""Product codes of random words, labels of random keys, and their scores from the definition, in float64."""

from __future__ import annotations

import torch

from ds_offload.kernels.product_code import PART, WORDS, ProductCode, decode_product, encode_product_reference
from ds_offload.kernels.product_scores_launch import product_launch

Case = tuple[torch.Tensor, ProductCode, torch.Tensor, torch.Tensor, torch.Tensor]


def product_code(*heads: int, head_dim: int, seed: int = 0) -> ProductCode:
    """A code of `heads` (KV heads, or layers and KV heads): a basis that stretches axes, and words of their size."""
    generator = torch.Generator().manual_seed(seed)
    square = torch.randn(*heads, head_dim, head_dim, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(square).Q * torch.linspace(2, 0.5, head_dim, dtype=torch.float64)
    words = torch.randn(*heads, head_dim // PART, WORDS, PART, generator=generator)
    words = words * torch.linspace(2, 0.5, head_dim).view(-1, 1, PART)
    mean = torch.randn(*heads, head_dim, generator=generator)
    return ProductCode(mean, basis.float().contiguous(), torch.linalg.inv(basis).float().contiguous(), words)


def product_case(head_dim: int, kv_heads: int, group: int, lengths: list[int], seed: int = 0) -> Case:
    """The first arguments of `product_scores`: labels of sequences three rows apart, and a query for each."""
    generator = torch.Generator().manual_seed(seed)
    code = product_code(kv_heads, head_dim=head_dim, seed=seed + 1)
    starts = [3 + sum(lengths[:n]) + 3 * n for n in range(len(lengths))]
    capacity = starts[-1] + lengths[-1] + 2
    keys = torch.randn(kv_heads, capacity, head_dim, generator=generator) + code.mean[:, None]
    labels = torch.empty(kv_heads, capacity, code.layout.row_bytes, dtype=torch.uint8)
    encode_product_reference(keys, code, labels)
    query = torch.randn(len(lengths), kv_heads * group, head_dim, generator=generator)
    return labels, code, query, torch.tensor(starts), torch.tensor(lengths)


def with_out(case: Case, max_length: int) -> torch.Tensor:
    """A poisoned result [B, Hkv, max_length]."""
    return torch.full((len(case[2]), len(case[0]), max_length), torch.nan, device=case[0].device)


def to_cuda(case: Case) -> Case:
    """The same case on the GPU."""
    labels, code, *others = case
    query, starts, lengths = (value.cuda() for value in others)
    return labels.cuda(), code.to(torch.device("cuda")), query, starts, lengths


def only(case: Case, b: int) -> Case:
    """Sequence b of a case by itself."""
    labels, code, query, starts, lengths = case
    return labels, code, query[b : b + 1], starts[b : b + 1], lengths[b : b + 1]


def double(code: ProductCode) -> ProductCode:
    """The same code in float64."""
    return ProductCode(code.mean.double(), code.basis.double(), code.turn.double(), code.words.double())


def exact_scores(case: Case, max_length: int, scaling: float) -> torch.Tensor:
    """Products of queries and decoded labels: float64 [B, H, max_length], -inf behind a sequence's tokens."""
    labels, code, query, starts, lengths = case
    keys = decode_product(labels, double(code))
    group = query.shape[1] // len(labels)
    out = torch.full((*query.shape[:2], max_length), -torch.inf, dtype=torch.float64)
    for b, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        for head in range(query.shape[1]):
            out[b, head, :length] = keys[head // group, start : start + length] @ query[b, head].double() * scaling
    return out


def table_steps(case: Case, scaling: float) -> torch.Tensor:
    """What numbers of a table are multiples of, float64 [B, H]: half of it is what a part may be off.

    The largest range of any part, over the largest number.
    """
    labels, code, query, _, _ = case
    wide = double(code)
    kv_heads = len(wide.mean)
    turned = query.double().unflatten(1, (kv_heads, -1)) @ wide.turn.mT * scaling
    values = torch.einsum("bhgpi,hpwi->bhgpw", turned.unflatten(-1, (-1, PART)), wide.words).flatten(1, 2)
    largest = product_launch(code.layout, query.shape[1] // len(labels)).largest
    return (values.amax(-1) - values.amin(-1)).amax(-1) / largest


def weights_of(scores: torch.Tensor, lengths: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """Softmax of scores [B, H, T] over the tokens, summed over each group: [B, Hkv, T]."""
    weights = torch.where((lengths > 0)[:, None, None], scores.softmax(-1), 0.0)
    return weights.unflatten(1, (kv_heads, -1)).sum(2)
