"""The best tokens by score, in ascending order: which rows a decode step attends to."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ds_offload.kernels.select_launch import SelectLaunch, select_launch
from ds_offload.kernels.select_long_rows import bracket_kernel, classify_kernel, threshold_kernel, write_kernel
from ds_offload.kernels.select_row import select_row_kernel
from ds_offload.kernels.select_row_parts import row_parts_kernel
from ds_offload.kernels.triton_runtime import launching, power_of_two

# -inf as an ordered integer (`_ordered`): what is not above it is no candidate.
MINUS_INF = -0x7F800001


def select_turns(rows: int, device: torch.device) -> Tensor:
    """What calls of `select_tokens` with up to `rows` rows use one after the other: int32 [rows + 1, 4] of zeros."""
    return torch.zeros(rows + 1, 4, dtype=torch.int32, device=device)


def select_tokens(
    scores: Tensor,
    first: int,
    last: Tensor,
    keep: Tensor,
    count: int,
    out: Tensor | None = None,
    turns: Tensor | None = None,
) -> Tensor:
    """The tokens of the highest scores of each row, ascending.

    Candidates of sequence b are the tokens t with first <= t < last[b] and a score above
    -inf. The min(keep, count, candidates) best are kept; of equal scores the lower
    token, and -0.0 is below 0.0. On CUDA it can be captured in a graph: one launch, or
    four, which read the scores twice, where all rows are too long to be held at once.

    Args:
        scores: float32 [B, Hkv, T], contiguous, without NaN.
        first: The first candidate, 0 or more.
        last: int64 [B] on the scores' device; the end of the candidates, of any value.
        keep: int64 [B] or [B, Hkv] on the scores' device; below 0: as 0.
        count: Columns of the result, of any size.
        out: int64 [B, Hkv, count], contiguous.
        turns: From `select_turns`, for calls that follow one another; every call leaves it
            as it was. None costs one launch more.

    Returns:
        int64 [B, Hkv, count]: `out` if given; the kept tokens, then -1.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    out = _checked_out(scores, first, last, keep, count, out)
    if not scores.is_cuda:
        return _select_on_cpu(scores, first, last, keep, count, out)
    with launching(scores.device, "select_tokens"):
        _launch(scores, first, last, keep, count, out, turns)
    return out


def _launch(
    scores: Tensor, first: int, last: Tensor, keep: Tensor, count: int, out: Tensor, turns: Tensor | None = None
) -> None:
    batch, heads, length = scores.shape
    rows = batch * heads
    if rows == 0 or count == 0:
        return
    launch = select_launch(rows, length, count)
    last, keep = last.contiguous(), keep.contiguous()
    rows_per_keep = heads if keep.dim() == 1 else 1
    first = min(first, length)
    sizes = (first, length, count, heads, rows_per_keep)
    alignment = math.gcd(16, scores.data_ptr(), 4 * length)
    ends = {"MINUS_INF": MINUS_INF, "ALIGNMENT": alignment, "num_warps": launch.warps}
    if launch.block:
        select_row_kernel[(rows,)](scores, last, keep, out, *sizes, BLOCK=launch.block, **ends)
    elif launch.part:
        if turns is None or len(turns) <= rows:
            turns = select_turns(rows, scores.device)
        _launch_row_parts(launch, scores, last, keep, out, turns, sizes, ends)
    else:
        _launch_long_rows(launch, scores, last, keep, out, sizes, ends)


def _launch_row_parts(
    launch: SelectLaunch,
    scores: Tensor,
    last: Tensor,
    keep: Tensor,
    out: Tensor,
    turns: Tensor,
    sizes: tuple[int, ...],
    ends: dict[str, int],
) -> None:
    rows, length = scores.shape[0] * scores.shape[1], scores.shape[2]
    parts = launch.parts(length)
    table = torch.empty(rows, 6, parts, dtype=torch.int32, device=scores.device)
    listed = torch.empty(rows, 2, launch.listed, dtype=torch.int32, device=scores.device)
    for stage in (1, 2) if launch.apart else (0,):
        row_parts_kernel[(rows * parts,)](
            *(scores, last, keep, out, turns, table, listed),
            *sizes,
            *(rows, parts),
            SAMPLE=launch.sample,
            SHIFT=launch.sample.bit_length() - 1,
            LISTED=launch.listed,
            PART=launch.part,
            PARTS_PAD=power_of_two(parts),
            STAGE=stage,
            **ends,
        )


def _launch_long_rows(
    launch: SelectLaunch,
    scores: Tensor,
    last: Tensor,
    keep: Tensor,
    out: Tensor,
    sizes: tuple[int, ...],
    ends: dict[str, int],
) -> None:
    first, length, count, heads, rows_per_keep = sizes
    rows = scores.shape[0] * heads
    chunks = launch.parts(length)
    state = torch.empty(rows, 8, dtype=torch.int32, device=scores.device)
    table = torch.empty(rows, 3, chunks, dtype=torch.int32, device=scores.device)
    listed = torch.empty(rows, launch.listed, dtype=torch.int32, device=scores.device)
    chunked = {"CHUNK": launch.chunk, "ALIGNMENT": ends["ALIGNMENT"]}
    bracket_kernel[(rows, 2)](
        *(scores, last, keep, state, *sizes),
        **{"SAMPLE": launch.sample, "SHIFT": launch.sample.bit_length() - 1, "LISTED": launch.listed},
        **{"MINUS_INF": MINUS_INF, "num_warps": launch.warps},
    )
    classify_kernel[(chunks, rows)](
        scores, last, state, table, listed, first, length, chunks, heads, LISTED=launch.listed, num_warps=8, **chunked
    )
    threshold_kernel[(rows,)](
        *(scores, last, keep, state, table, listed, first, length, count, chunks, heads, rows_per_keep),
        **{"LISTED": launch.listed, "WIDTH": launch.width, "CHUNK": launch.chunk},
        **ends,
    )
    write_kernel[(chunks, rows)](
        scores, last, state, table, out, first, length, count, chunks, heads, num_warps=8, **chunked
    )


def _select_on_cpu(scores: Tensor, first: int, last: Tensor, keep: Tensor, count: int, out: Tensor) -> Tensor:
    """`select_tokens` row by row: a partition of 32-bit integers is 20 times as fast as torch's topk of 64-bit ones."""
    batch, heads, length = scores.shape
    bits = scores.view(torch.int32).numpy()
    wanted = (keep[:, None] if keep.dim() == 1 else keep).expand(batch, heads).tolist()
    ends = last.tolist()
    out.fill_(-1)
    for b, h in np.ndindex(batch, heads):
        row = bits[b, h, first : max(0, min(ends[b], length))]
        keys = row ^ ((row >> 31) & 0x7FFFFFFF)
        kept = max(0, min(wanted[b][h], count))
        chosen = keys > MINUS_INF
        if 0 < kept < len(keys):
            threshold = max(np.partition(keys, len(keys) - kept)[len(keys) - kept], MINUS_INF)
            above = keys > threshold
            if threshold > MINUS_INF:
                above[np.flatnonzero(keys == threshold)[: kept - above.sum()]] = True
            chosen = above
        tokens = np.flatnonzero(chosen)[:kept] + first
        out[b, h, : len(tokens)] = torch.from_numpy(tokens)
    return out


def top_tokens(scores: Tensor, count: int) -> Tensor:
    """Indices `[..., count]` int64 of the highest `scores` `[..., T]` float32, the best first.

    Equal scores are taken lowest index first (labels of few bits tie often), so the
    result is the same on every device, and that of a smaller count is its beginning.
    """
    bits = scores.view(torch.int32)
    # As integers, floats order like this: negative ones by their flipped magnitude.
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(torch.int64)
    index = torch.arange(scores.shape[-1], device=scores.device)
    keys = (ordered << 32) | (0x7FFFFFFF - index)
    return keys.topk(count, -1).indices


def select_tokens_reference(
    scores: Tensor, first: int, last: Tensor, keep: Tensor, count: int, out: Tensor | None = None
) -> Tensor:
    """`select_tokens` in torch."""
    out = _checked_out(scores, first, last, keep, count, out)
    length = scores.shape[2]
    token = torch.arange(length, device=scores.device)
    outside = (token < first) | (token >= last[:, None, None])
    candidates = scores.masked_fill(outside, -torch.inf)
    tokens = top_tokens(candidates, min(count, length))
    rank = torch.arange(tokens.shape[2], device=scores.device)
    wanted = keep[:, None, None] if keep.dim() == 1 else keep[:, :, None]
    dropped = (rank >= wanted) | (candidates.gather(-1, tokens) == -torch.inf)
    tokens = tokens.masked_fill(dropped, length).sort(-1).values
    out.fill_(-1)
    out[..., : tokens.shape[2]] = tokens.masked_fill(tokens == length, -1)
    return out


def _checked_out(scores: Tensor, first: int, last: Tensor, keep: Tensor, count: int, out: Tensor | None) -> Tensor:
    """The result's tensor, after every argument's shape, dtype and device is checked."""
    if scores.dtype != torch.float32 or scores.dim() != 3 or not scores.is_contiguous():
        raise ValueError(f"scores {scores.dtype} {tuple(scores.shape)} must be float32 [B, Hkv, T], contiguous")
    batch, heads = scores.shape[:2]
    if last.dtype != torch.int64 or last.shape != (batch,):
        raise ValueError(f"last {last.dtype} {tuple(last.shape)} must be int64 ({batch},)")
    if keep.dtype != torch.int64 or keep.shape not in ((batch,), (batch, heads)):
        raise ValueError(f"keep {keep.dtype} {tuple(keep.shape)} must be int64 ({batch},) or ({batch}, {heads})")
    if first < 0 or count < 0:
        raise ValueError(f"first={first} and count={count} must not be negative")
    shape = (batch, heads, count)
    if out is None:
        out = torch.empty(shape, dtype=torch.int64, device=scores.device)
    elif out.dtype != torch.int64 or out.shape != shape or not out.is_contiguous():
        raise ValueError(f"out {out.dtype} {tuple(out.shape)} must be int64 {shape}, contiguous")
    for name, value in (("last", last), ("keep", keep), ("out", out)):
        if value.device != scores.device:
            raise ValueError(f"{name} is on {value.device}; it must be on {scores.device} like the scores")
    return out
