"""Cases for the tests of `prompt_rows`: the same tensors each time they are made."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ds_offload.kernels.new_token import HeadNorms


@dataclass
class Case:
    """Arguments of `prompt_rows`; what it writes is poisoned, and a part of larger tensors."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    rope: tuple[torch.Tensor, torch.Tensor]
    queries: torch.Tensor
    staging: torch.Tensor
    rows: torch.Tensor
    norms: HeadNorms | None

    @property
    def arguments(self) -> tuple:
        return self.query, self.key, self.value, self.rope, self.queries, self.rows, self.norms


def make_case(
    tokens: int,
    kv_heads: int,
    group: int,
    dim: int,
    normed: bool,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Case:
    generator = torch.Generator().manual_seed(dim + tokens)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).to(device)

    heads = kv_heads * group
    query, key, value = (random(tokens, count * dim) for count in (heads, kv_heads, kv_heads))
    angles = torch.rand(tokens, dim // 2, generator=generator).repeat(1, 2) * 6
    norms = HeadNorms(1 + random(dim), 1 + random(dim), 1e-6) if normed else None
    staging = torch.full((kv_heads, tokens + 7, 2, dim), torch.nan, dtype=dtype, device=device)
    queries = torch.full((tokens, heads, dim), torch.nan, dtype=dtype, device=device)
    rope = tuple(part.to(dtype).to(device) for part in (angles.cos(), angles.sin()))
    return Case(query, key, value, rope, queries, staging, staging[:, 3 : 3 + tokens], norms)
