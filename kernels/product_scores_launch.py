"""Launches of the CUDA kernels of scores of product codes (kernels/product_scores.py)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ds_offload.kernels.label_scores_kernels import totals_kernel
from ds_offload.kernels.product_code import ProductLayout
from ds_offload.kernels.product_lookup import LARGEST_IN_BYTE, lookup_ptx, sum_words
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
LARGEST_IN_HALF = 255
# Whole numbers for weights: so many to an octave, up to this one for a weight of every query head of a group.
OCTAVE, HIGHEST = 240, 32640
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
        each, warps: Tokens of a thread, and warps of a program, that writes a score for each.
        summed: Tokens of a thread of a program that sums, with one warp: it exchanges nothing with others.
        weighed: Tokens of a program that makes weights of sums, with four warps.
    """

    heads: int
    vector: int
    each: int
    summed: int
    warps: int = 4
    weighed: int = 1024

    @property
    def block(self) -> int:
        """Tokens of a program that writes scores."""
        return 32 * self.warps * self.each

    @property
    def part(self) -> int:
        """Tokens of a program that sums."""
        return 32 * self.summed

    @property
    def largest(self) -> int:
        """The largest number of a table."""
        return LARGEST_IN_BYTE if self.heads > 2 else LARGEST_IN_HALF


def product_launch(layout: ProductLayout, group: int) -> ProductLaunch:
    """The launch for heads of a size and a group of `group` query heads.

    It depends on nothing else, so a row gives the same bits in every batch and at every
    length. A thread keeps whole rows in registers, at most 16 words of them, or 32 where it sums.
    """
    heads = max(n for n in range(1, 5) if group % n == 0)
    words = power_of_two(layout.row_bytes // 4)
    each, summed = min(4, max(1, 16 // words)), min(8, max(1, 32 // words))
    return ProductLaunch(heads, math.gcd(16, layout.row_bytes) // 4, each, summed)


def weights_bytes(layout: ProductLayout, sequences: int, heads: int, group: int, longest: int) -> int:
    """Device memory that `launch_weights` takes for a while: entries, tables, sums and partial softmaxes."""
    launch, rows = product_launch(layout, group), sequences * heads
    packs = rows // launch.heads
    sums = packs * sum_words(launch.heads) * _sums_stride(longest) * _sums_dtype(launch).itemsize
    return (rows + packs) * layout.parts * 16 * 4 + sums + rows * (8 * -(-longest // launch.part) + 16)


def launch_scores(inputs: ProductInputs, out: Tensor) -> None:
    """Fill `out` with scores as `product_scores` says, one query head per KV head; every argument checked."""
    if out.numel() == 0:
        return
    launch = product_launch(inputs.code.layout, 1)
    table, factors = _tables(inputs, launch, inputs.scaling)
    scores_kernel[(-(-inputs.max_length // launch.block), inputs.batch * inputs.kv_heads)](
        *(inputs.labels, table, factors, inputs.starts.contiguous(), inputs.lengths.contiguous(), out),
        *(inputs.labels.stride(0), inputs.kv_heads, inputs.max_length),
        **_constants(inputs, launch, 1, launch.each, launch.warps),
        ALIGNMENT=_alignment(out),
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
    parts, stride, lengths = -(-inputs.max_length // launch.part), _sums_stride(inputs.max_length), inputs.lengths
    lengths = lengths.contiguous()
    shape = (rows // launch.heads, sum_words(launch.heads), stride)
    sums = torch.empty(shape, dtype=_sums_dtype(launch), device=device)
    partials = torch.empty(rows, 2, parts, dtype=torch.float32, device=device)
    totals = torch.empty(rows, 2, dtype=torch.float32, device=device)
    sums_kernel[(parts, pairs, inputs.group // launch.heads)](
        *(inputs.labels, table, factors, inputs.starts.contiguous(), lengths, sums, partials),
        *(inputs.labels.stride(0), inputs.kv_heads, inputs.group, parts, stride),
        **_constants(inputs, launch, launch.heads, launch.summed, 1),
        HEADS=launch.heads,
        BLOCK=launch.part,
        num_warps=1,
    )
    totals_kernel[(rows,)](
        *(partials, lengths, totals, inputs.heads, parts), BLOCK=launch.part, WIDTH=1024, num_warps=8
    )
    weights_kernel[(-(-inputs.max_length // launch.weighed), pairs)](
        *(sums, factors, lengths, totals, out, inputs.kv_heads, stride, inputs.max_length),
        GROUP=inputs.group,
        HEADS=launch.heads,
        OCTAVE=OCTAVE,
        HIGHEST=HIGHEST,
        ALIGNMENT=_alignment(out),
        BLOCK=launch.weighed,
        PTX=out.is_cuda,
        num_warps=4,
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
        LARGEST=launch.largest,
        LEAST_RANGE=LEAST_RANGE,
        num_warps=4,
    )
    return table, factors


def _constants(inputs: ProductInputs, launch: ProductLaunch, heads: int, each: int, warps: int) -> dict[str, int | str]:
    """What a kernel that reads labels is compiled for. Triton's interpreter has no inline PTX."""
    layout = inputs.code.layout
    row_words = layout.row_bytes // 4
    lookup = lookup_ptx(layout.parts, row_words, heads, each, 32 * warps) if inputs.labels.is_cuda else ""
    return {"PARTS": layout.parts, "ROW_WORDS": row_words, "VECTOR": launch.vector, "LOOKUP": lookup, "EACH": each}


def _alignment(out: Tensor) -> int:
    """Bytes, at most 16, to which every row of `out` [B, Hkv, T] is aligned."""
    return math.gcd(16, out.data_ptr(), out.element_size() * out.shape[2])


def _sums_dtype(launch: ProductLaunch) -> torch.dtype:
    """Of words of sums: those of one head fit 16 bits."""
    return torch.int16 if launch.heads == 1 else torch.int32


def _sums_stride(max_length: int) -> int:
    return -(-max_length // _SUMS_ALIGNMENT) * _SUMS_ALIGNMENT
