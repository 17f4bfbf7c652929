"""Tokens to gather from segments, and what they must come to."""

from __future__ import annotations

import torch

from ds_offload.kernels.segment_table import SegmentTable


def choose(table: SegmentTable, kv_heads: int, kept: int, capacity: int, seed: int = 0):
    """Sorted tokens, about a third of them skipped, and distinct slots in any order: int64 [B, Hkv, K] each."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.full((len(table.tensors), kv_heads, kept), -1)
    slots = torch.full_like(tokens, 10**6)
    for b, segments in enumerate(table.tensors):
        length = len(segments) * table.segment_tokens
        for h in range(kv_heads):
            count = min(kept, length)
            tokens[b, h, :count] = torch.randperm(length, generator=generator)[:count].sort().values
            tokens[b, h][torch.rand(kept, generator=generator) < 0.3] = -1
            slots[b, h, :count] = torch.randperm(capacity, generator=generator)[:count]
    return tokens, slots


def naive(table: SegmentTable, layer: int, tokens: torch.Tensor, slots: torch.Tensor, out: torch.Tensor) -> None:
    for b, h, i in torch.cartesian_prod(*map(torch.arange, tokens.shape)).tolist():
        token = int(tokens[b, h, i])
        if token >= 0:
            segment = table.tensors[b][token // table.segment_tokens]
            out[b, h, slots[b, h, i]] = segment[layer, h, token % table.segment_tokens].to(out.device)


def poisoned(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full(shape, torch.nan, dtype=dtype)


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Poison included."""
    assert torch.equal(actual.cpu().contiguous().view(torch.uint8), expected.cpu().contiguous().view(torch.uint8))
