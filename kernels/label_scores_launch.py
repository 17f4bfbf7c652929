"""Launches of the CUDA kernels of label scores (kernels/label_scores.py)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_offload.kernels.label_codec import LabelLayout
from ds_offload.kernels.label_scores_inputs import ScoreInputs
from ds_offload.kernels.label_scores_kernels import (
    arrange_kernel,
    partials_kernel,
    scores_kernel,
    totals_kernel,
    weights_kernel,
)
from ds_offload.kernels.triton_runtime import power_of_two

LARGEST_CODE = 127
# The codes of a smaller query are those of one this large: no division by zero.
LEAST_PEAK = 2.0**-100


@dataclass(frozen=True)
class ScoresLaunch:
    """Launch of the CUDA kernels.

    Attributes:
        heads: Query heads of a group that one program scores; divides the group.
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


def scores_launch(layout: LabelLayout, group: int) -> ScoresLaunch:
    """The launch for a label layout and a group of `group` query heads.

    It depends on nothing else, so a row gives the same bits in every batch and at every
    length. A thread keeps whole rows in registers and, for several heads, every masked
    word of them: 4 rows of 16 bytes at 2 bits are 64 masked words, and the kernels take
    about 96 registers a thread (sm_90); 8 such rows would take twice that.
    """
    heads = max(n for n in range(1, 9) if group % n == 0)
    fields = 2 if heads == 1 or layout.bits == 16 else layout.per_byte
    rows = min(8, max(1, 64 // (fields * power_of_two(layout.row_bytes // 4))))
    return ScoresLaunch(heads, vector=math.gcd(16, layout.row_bytes) // 4, block=128 * rows, part=32 * rows)


def launch_scores(inputs: ScoreInputs, out: Tensor) -> None:
    """Fill `out` as `label_scores` says; every argument checked."""
    if out.numel() == 0:
        return
    launch = scores_launch(inputs.layout, inputs.group)
    arranged = _arranged(inputs, inputs.scaling)
    blocks = -(-inputs.max_length // launch.block)
    scores_kernel[(blocks, inputs.batch * inputs.kv_heads, inputs.group // launch.heads)](
        *_read(inputs, arranged),
        out,
        *(inputs.labels.stride(0), inputs.kv_heads, inputs.max_length),
        **_constants(inputs, launch, arranged),
        HEADS=launch.heads,
        BLOCK=launch.block,
        num_warps=launch.warps,
    )


def launch_weights(inputs: ScoreInputs, out: Tensor) -> None:
    """Fill `out` with weights as `group_scores` says; every argument checked."""
    if out.numel() == 0:
        return
    launch = scores_launch(inputs.layout, inputs.group)
    # Scores in powers of two: exp2 is what the device computes.
    arranged = _arranged(inputs, inputs.scaling * math.log2(math.e))
    read, constants = _read(inputs, arranged), _constants(inputs, launch, arranged)
    rows, pairs = inputs.batch * inputs.heads, inputs.batch * inputs.kv_heads
    stride, kv_heads = inputs.labels.stride(0), inputs.kv_heads
    parts, blocks = -(-inputs.max_length // launch.part), -(-inputs.max_length // launch.block)
    partials = torch.empty(rows, 2, parts, dtype=torch.float32, device=out.device)
    totals = torch.empty(rows, 2, dtype=torch.float32, device=out.device)
    partials_kernel[(parts, pairs, inputs.group // launch.heads)](
        *(*read, partials, stride, kv_heads, parts),
        **constants,
        HEADS=launch.heads,
        BLOCK=launch.part,
        num_warps=1,
    )
    totals_kernel[(rows,)](
        *(partials, read[3], totals, inputs.heads, parts), BLOCK=launch.part, WIDTH=1024, num_warps=8
    )
    weights_kernel[(blocks, pairs)](
        *(*read, totals, out, stride, kv_heads, inputs.max_length),
        **constants,
        G=inputs.group,
        BLOCK=launch.block,
        num_warps=launch.warps,
    )


def _arranged(inputs: ScoreInputs, scaling: float) -> Tensor:
    """Every head's query as the kernels read it: int32 [B * H, SIZE]."""
    layout = inputs.layout
    if layout.bits == 16:
        per_byte, width = 1, layout.row_bytes // 2
        size = width
    else:
        per_byte, width = layout.per_byte, layout.row_bytes
        size = per_byte * width // 4 + 2
        # The kernels' sums are whole multiples of 2 ** (8 - bits).
        scaling /= LARGEST_CODE * layout.largest * 2 ** (8 - layout.bits)
    rows = inputs.batch * inputs.heads
    out = torch.empty(rows, size, dtype=torch.int32, device=inputs.query.device)
    arrange_kernel[(rows,)](
        *(inputs.query, inputs.channels.contiguous(), out, scaling, inputs.heads, *inputs.query.stride()),
        G=inputs.group,
        R=layout.channels,
        BITS=layout.bits,
        PER=per_byte,
        WIDTH=width,
        WIDTH_PAD=power_of_two(width),
        SIZE=size,
        LEAST_PEAK=LEAST_PEAK,
        num_warps=1,
        # A product and a sum in one rounding would give other codes than the reference.
        enable_fp_fusion=False,
    )
    return out


def _read(inputs: ScoreInputs, arranged: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What every kernel that reads labels reads."""
    return inputs.labels, arranged, inputs.starts.contiguous(), inputs.lengths.contiguous()


def _constants(inputs: ScoreInputs, launch: ScoresLaunch, arranged: Tensor) -> dict[str, int | bool]:
    """What every kernel that reads labels is compiled for. Triton's interpreter has no inline PTX."""
    return {
        "BITS": inputs.layout.bits,
        "WORDS": inputs.layout.row_bytes // 4,
        "SIZE": arranged.shape[1],
        "VECTOR": launch.vector,
        "PTX": inputs.labels.is_cuda,
    }
