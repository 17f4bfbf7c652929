"""The best tokens by score, in ascending order: which rows a decode step attends to."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ds_offload.kernels.select_bracket import bracket_kernel
from ds_offload.kernels.select_long_rows import classify_kernel, threshold_kernel, write_kernel
from ds_offload.kernels.select_row import select_row_kernel
from ds_offload.kernels.triton_runtime import launching

# As ordered integers, of float32 -inf and of int16 -1: what is not above it is no candidate.
NONE = {torch.float32: -0x7F800001, torch.int16: -1}


@dataclass(frozen=True)
class SelectLaunch:
    """Launch of the CUDA kernels.

    Attributes:
        block: Tokens of a row that one program holds, at least the row; 0 where a row is
            shared out among several programs, which the other sizes are for.
        warps: Warps of a program that holds a row, a sample or a list.
        sample: Tokens of a row from which its threshold is bracketed, below 2 ** 16.
        listed: Scores of a row inside the bracket that fit in its list, below 2 ** 16.
        chunk: Tokens per program of one warp, which exchanges nothing with others; below 2 ** 15: counts of a
            chunk are packed in 16 bits.
        width: Chunks of a row whose counts are summed at a time.
    """

    block: int
    warps: int = 16
    sample: int = 4096
    listed: int = 8192
    chunk: int = 512
    width: int = 512


# Tokens that a row of scores is a multiple of: several are read and written at once.
_ROW_TOKENS = 64
# Samples, list, and warps of a program that holds either, the fastest first.
_BRACKETS = ((4096, 8192, 8), (8192, 16384, 16), (16384, 32768, 16))


def score_width(length: int) -> int:
    """Columns of scores of `length` tokens, at least, such that every row begins at a multiple of 16 bytes."""
    return -(-length // _ROW_TOKENS) * _ROW_TOKENS


def select_launch(length: int, count: int) -> SelectLaunch:
    """The launch for rows of `length` tokens of which `count` are kept at most.

    16,384 scores are 32 registers a thread of 16 warps: rows up to that take one launch.
    For longer rows, a bracket of five standard deviations to each side must fit in the
    list with room to spare; the smallest sample and list that allow it are the fastest.
    Where none does, the bracket is narrowed to fit the last, so it misses more often.
    Chunks of 512 tokens and one warp took 48 us for 32 rows of 131,072 whole numbers on an
    H100, of 1,024 or of 2,048 and four warps 51 and 53 us.
    """
    if length <= 4096:
        return SelectLaunch(block=4096, warps=8)
    if length <= 16384:
        return SelectLaunch(block=16384)
    for sample, listed, warps in _BRACKETS:  # noqa: B007
        rank = min(sample, count * sample / length)
        spread = 5 * math.sqrt(rank * (1 - rank / sample)) + 3
        if 2.5 * spread * length / sample <= 0.6 * listed:
            break
    return SelectLaunch(block=0, warps=warps, sample=sample, listed=listed)


def select_tokens(
    scores: Tensor, first: int, last: Tensor, keep: Tensor, count: int, out: Tensor | None = None
) -> Tensor:
    """The tokens of the highest scores of each row, ascending.

    Candidates of sequence b are the tokens t with first <= t < last[b] and a score above
    -inf or, where scores are whole numbers, above -1. The min(keep, count, candidates) best
    are kept; of equal scores the lower token, and -0.0 is below 0.0. On CUDA it can be
    captured in a graph: one launch for rows of up to 16,384 tokens, else four, which read
    the scores twice.

    Args:
        scores: float32 without NaN, or int16, [B, Hkv, T], contiguous.
        first: The first candidate, 0 or more.
        last: int64 [B] on the scores' device; the end of the candidates, of any value.
        keep: int64 [B] or [B, Hkv] on the scores' device; below 0: as 0.
        count: Columns of the result, of any size.
        out: int64 [B, Hkv, count], contiguous.

    Returns:
        int64 [B, Hkv, count]: `out` if given; the kept tokens, then -1.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    out = _checked_out(scores, first, last, keep, count, out)
    if not scores.is_cuda:
        return _select_on_cpu(scores, first, last, keep, count, out)
    with launching(scores.device, "select_tokens"):
        _launch(scores, first, last, keep, count, out)
    return out


def _launch(scores: Tensor, first: int, last: Tensor, keep: Tensor, count: int, out: Tensor) -> None:
    batch, heads, length = scores.shape
    rows = batch * heads
    if rows == 0 or count == 0:
        return
    launch = select_launch(length, count)
    last, keep = last.contiguous(), keep.contiguous()
    rows_per_keep = heads if keep.dim() == 1 else 1
    first = min(first, length)
    alignment = math.gcd(16, scores.data_ptr(), scores.element_size() * length)
    ends = {"NONE": NONE[scores.dtype], "num_warps": launch.warps}
    if launch.block:
        tail = (first, length, count, heads, rows_per_keep)
        select_row_kernel[(rows,)](scores, last, keep, out, *tail, BLOCK=launch.block, ALIGNMENT=alignment, **ends)
        return
    chunks = -(-length // launch.chunk)
    state = torch.empty(rows, 8, dtype=torch.int32, device=scores.device)
    table = torch.empty(rows, 3, chunks, dtype=torch.int32, device=scores.device)
    listed = torch.empty(rows, launch.listed, dtype=torch.int32, device=scores.device)
    sizes = {"CHUNK": launch.chunk, "ALIGNMENT": alignment}
    shift = launch.sample.bit_length() - 1
    bracket_kernel[(rows,)](
        *(scores, last, keep, state, first, length, count, heads, rows_per_keep),
        **{"SAMPLE": launch.sample, "SHIFT": shift, "LISTED": launch.listed},
        **ends,
    )
    classify_kernel[(chunks, rows)](
        *(scores, last, state, table, listed, first, length, chunks, heads),
        LISTED=launch.listed,
        num_warps=1,
        **sizes,
    )
    threshold_kernel[(rows,)](
        *(scores, last, keep, state, table, listed, first, length, count, chunks, heads, rows_per_keep),
        **{"LISTED": launch.listed, "WIDTH": launch.width},
        **sizes,
        **ends,
    )
    write_kernel[(chunks, rows)](
        scores, last, state, table, out, first, length, count, chunks, heads, num_warps=1, **sizes
    )


def _select_on_cpu(scores: Tensor, first: int, last: Tensor, keep: Tensor, count: int, out: Tensor) -> Tensor:
    """`select_tokens` row by row: a partition of 32-bit integers is 20 times as fast as torch's topk of 64-bit ones."""
    batch, heads, length = scores.shape
    none = NONE[scores.dtype]
    wanted = (keep[:, None] if keep.dim() == 1 else keep).expand(batch, heads).tolist()
    ends = last.tolist()
    out.fill_(-1)
    for b, h in np.ndindex(batch, heads):
        keys = _ordered(scores[b, h, first : max(0, min(ends[b], length))]).numpy()
        kept = max(0, min(wanted[b][h], count))
        chosen = keys > none
        if 0 < kept < len(keys):
            threshold = max(np.partition(keys, len(keys) - kept)[len(keys) - kept], none)
            above = keys > threshold
            if threshold > none:
                above[np.flatnonzero(keys == threshold)[: kept - above.sum()]] = True
            chosen = above
        tokens = np.flatnonzero(chosen)[:kept] + first
        out[b, h, : len(tokens)] = torch.from_numpy(tokens)
    return out


def _ordered(scores: Tensor) -> Tensor:
    """Scores as int32 of the same order: float32 by its bits, negative ones by their flipped magnitude."""
    if scores.dtype == torch.int16:
        return scores.to(torch.int32)
    bits = scores.view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def top_tokens(scores: Tensor, count: int) -> Tensor:
    """Indices `[..., count]` int64 of the highest `scores` `[..., T]` float32 or int16, the best first.

    Equal scores are taken lowest index first (labels of few bits tie often), so the
    result is the same on every device, and that of a smaller count is its beginning.
    """
    index = torch.arange(scores.shape[-1], device=scores.device)
    keys = (_ordered(scores).to(torch.int64) << 32) | (0x7FFFFFFF - index)
    return keys.topk(count, -1).indices


def select_tokens_reference(
    scores: Tensor, first: int, last: Tensor, keep: Tensor, count: int, out: Tensor | None = None
) -> Tensor:
    """`select_tokens` in torch."""
    out = _checked_out(scores, first, last, keep, count, out)
    length = scores.shape[2]
    token = torch.arange(length, device=scores.device)
    outside = (token < first) | (token >= last[:, None, None])
    lowest = -1 if scores.dtype == torch.int16 else -torch.inf
    candidates = scores.masked_fill(outside, lowest)
    tokens = top_tokens(candidates, min(count, length))
    rank = torch.arange(tokens.shape[2], device=scores.device)
    wanted = keep[:, None, None] if keep.dim() == 1 else keep[:, :, None]
    dropped = (rank >= wanted) | (candidates.gather(-1, tokens) <= lowest)
    tokens = tokens.masked_fill(dropped, length).sort(-1).values
    out.fill_(-1)
    out[..., : tokens.shape[2]] = tokens.masked_fill(tokens == length, -1)
    return out


def _checked_out(scores: Tensor, first: int, last: Tensor, keep: Tensor, count: int, out: Tensor | None) -> Tensor:
    """The result's tensor, after every argument's shape, dtype and device is checked."""
    if scores.dtype not in NONE or scores.dim() != 3 or not scores.is_contiguous():
        raise ValueError(
            f"scores {scores.dtype} {tuple(scores.shape)} must be float32 or int16 [B, Hkv, T], contiguous"
        )
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
