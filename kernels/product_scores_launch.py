"""Launches of the CUDA kernels of scores of product codes (kernels/product_scores.py)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ds_offload.kernels.label_scores_kernels import totals_kernel
from ds_offload.kernels.product_code import ProductLayout
from ds_offload.kernels.product_scores_kernels import (
    entries_kernel,
    scores_kernel,
    sums_kernel,
    table_kernel,
    weights_kernel,
)
from ds_offload.kernels.triton_runtime import power_of_two

if TYPE_CHECKING:
    from ds_offload.kernels.product_scores import ProductInputs

# A sum of 128 numbers, of a head of 512 channels, stays below 2 ** 15.
LARGEST_NUMBER = 255
# The range of a table whose entries are all the same: no division by zero.
LEAST_RANGE = 2.0**-100
# Parts of a program that makes entries.
_ENTRY_PARTS = 4
# Sums of a head begin at a multiple of so many.
_SUMS_ALIGNMENT = 64


@dataclass(frozen=True)
class ProductLaunch:
    """Launch of the CUDA kernels.

    Attributes:
        heads: Query heads of a group whose numbers share a table; divides the group.
        vector: Words of 32 bits that a thread reads at once.
        block: Tokens per program that writes a result for each, with `warps` warps.
        part: Tokens per program that sums, with one warp: it exchanges nothing with others.
        warps: Warps per program that does not sum.
    """

    heads: int
    vector: int
    block: int
    part: int
    warps: int = 4


def product_launch(layout: ProductLayout, group: int) -> ProductLaunch:
    """The launch for heads of a size and a group of `group` query heads.

    It depends on nothing else, so a row gives the same bits in every batch and at every
    length. A thread keeps whole rows in registers, at most 16 words of them.
    """
    heads = max(n for n in range(1, 5) if group % n == 0)
    rows = min(4, max(1, 16 // power_of_two(layout.row_bytes // 4)))
    return ProductLaunch(heads, math.gcd(16, layout.row_bytes) // 4, 128 * rows, 32 * rows)


def weights_bytes(layout: ProductLayout, sequences: int, heads: int, group: int, longest: int) -> int:
    """Device memory that `launch_weights` takes for a while: entries, tables, sums and partial softmaxes."""
    launch, rows = product_launch(layout, group), sequences * heads
    tables = (rows + rows // launch.heads) * layout.parts * 16 * 4
    return tables + rows * (2 * _sums_stride(longest) + 8 * -(-longest // launch.part) + 16)


def launch_scores(inputs: ProductInputs, out: Tensor) -> None:
    """Fill `out` with scores as `product_scores` says, one query head per KV head; every argument checked."""
    if out.numel() == 0:
        return
    launch = product_launch(inputs.code.layout, 1)
    table, factors = _tables(inputs, launch, inputs.scaling)
    scores_kernel[(-(-inputs.max_length // launch.block), inputs.batch * inputs.kv_heads)](
        *(inputs.labels, table, factors, inputs.starts.contiguous(), inputs.lengths.contiguous(), out),
        *(inputs.labels.stride(0), inputs.kv_heads, inputs.max_length),
        **_constants(inputs, launch),
        BLOCK=launch.block,
        num_warps=launch.warps,
    )


def launch_weights(inputs: ProductInputs, out: Tensor) -> None:
    """Fill `out` with weights as `product_scores` says; every argument checked."""
    if out.numel() == 0:
        return
    launch = product_launch(inputs.code.layout, inputs.group)
    # Scores in powers of two: exp2 is what the device computes.
    table, factors = _tables(inputs, launch, inputs.scaling * math.log2(math.e))
    rows, pairs, device = inputs.batch * inputs.heads, inputs.batch * inputs.kv_heads, out.device
    parts, blocks = -(-inputs.max_length // launch.part), -(-inputs.max_length // launch.block)
    stride, lengths = _sums_stride(inputs.max_length), inputs.lengths.contiguous()
    sums = torch.empty(rows, stride, dtype=torch.int16, device=device)
    partials = torch.empty(rows, 2, parts, dtype=torch.float32, device=device)
    totals = torch.empty(rows, 2, dtype=torch.float32, device=device)
    sums_kernel[(parts, pairs, inputs.group // launch.heads)](
        *(inputs.labels, table, factors, inputs.starts.contiguous(), lengths, sums, partials),
        *(inputs.labels.stride(0), inputs.kv_heads, inputs.group, parts, stride),
        **_constants(inputs, launch),
        HEADS=launch.heads,
        BLOCK=launch.part,
        num_warps=1,
    )
    totals_kernel[(rows,)](
        *(partials, lengths, totals, inputs.heads, parts), BLOCK=launch.part, WIDTH=1024, num_warps=8
    )
    weights_kernel[(blocks, pairs)](
        *(sums, factors, lengths, totals, out, inputs.kv_heads, stride, inputs.max_length),
        G=inputs.group,
        BLOCK=launch.block,
        num_warps=launch.warps,
    )


def _tables(inputs: ProductInputs, launch: ProductLaunch, scaling: float) -> tuple[Tensor, Tensor]:
    """The packs' tables int32 [B * H / heads, P, 16], and every head's step and offset float32 [B * H, 2]."""
    code, layout = inputs.code, inputs.code.layout
    rows = inputs.batch * inputs.heads
    packs = rows // launch.heads
    table = torch.empty(packs, layout.parts, 16, dtype=torch.int32, device=inputs.query.device)
    factors = torch.empty(rows, 2, dtype=torch.float32, device=inputs.query.device)
    entries = torch.empty(rows, layout.parts, 16, dtype=torch.float32, device=inputs.query.device)
    entries_kernel[(rows, -(-layout.parts // _ENTRY_PARTS))](
        *(inputs.query, code.turn, code.words, entries, scaling, inputs.heads, *inputs.query.stride()),
        G=inputs.group,
        D=layout.head_dim,
        D_PAD=power_of_two(layout.head_dim),
        PARTS=layout.parts,
        EACH=_ENTRY_PARTS,
        num_warps=4,
    )
    table_kernel[(packs,)](
        *(entries, table, factors),
        HEADS=launch.heads,
        PARTS=layout.parts,
        PARTS_PAD=power_of_two(layout.parts),
        LEAST_RANGE=LEAST_RANGE,
        num_warps=4,
    )
    return table, factors


def _constants(inputs: ProductInputs, launch: ProductLaunch) -> dict[str, int]:
    """What every kernel that reads labels is compiled for. Triton's interpreter has no inline PTX."""
    layout = inputs.code.layout
    return {
        "PARTS": layout.parts,
        "ROW_WORDS": layout.row_bytes // 4,
        "VECTOR": launch.vector,
        "PTX": inputs.labels.is_cuda,
    }


def _sums_stride(max_length: int) -> int:
    return -(-max_length // _SUMS_ALIGNMENT) * _SUMS_ALIGNMENT
