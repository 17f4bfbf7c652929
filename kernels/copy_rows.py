"""Copy of a prompt's K/V rows to the host store by few programs, beside the prefill that makes them."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_offload.kernels.triton_runtime import jit, launching, tl

# So small that they find a place beside the programs of a matrix product, which take nearly all of a multiprocessor's
# registers. Sixteen keep up with a prefill; more send writes faster than the link takes them, which stand in the way of
# what the compute stream reads and writes. docs/benchmarks.md has what other sizes cost.
PROGRAMS = 16
WARPS = 1
REGISTERS = 32
# Words of 4 bytes that a program has in flight.
TILE = 512
# Of a head's rows: their words are counted by 32 bits.
MOST_BYTES = 8 * 10**9


@jit(do_not_specialize=["heads", "tiles"])
def _copy_kernel(source, target, words, source_stride, target_stride, heads, tiles, TILE: tl.constexpr):
    """Each turn of a program copies a tile of one head's rows."""
    turn = tl.program_id(0)
    while turn < heads * tiles:
        head = (turn // tiles).to(tl.int64)
        word = turn % tiles * TILE + tl.arange(0, TILE)
        inside = word < words
        value = tl.load(source + head * source_stride + word, mask=inside, other=0)
        tl.store(target + head * target_stride + word, value, mask=inside)
        turn += tl.num_programs(0)


def copy_rows(source: Tensor, target: Tensor) -> None:
    """Copy rows `[Hkv, n, 2, D]` to `target` of the same shape and dtype, on the current stream.

    Both are on one device, or both on the CPU; each head's rows are contiguous and begin at a multiple of 4 bytes.

    Raises:
        ValueError: shapes, dtypes, devices or strides do not fit.
    """
    _check(source, target)
    if not source.is_cuda:
        target.copy_(source)
        return
    if source.numel() == 0:
        return
    heads = source.shape[0]
    # The innermost dimension holds whole words, as in the store.
    of, to = source.view(torch.int32), target.view(torch.int32)
    words = of.numel() // heads
    tiles = -(-words // TILE)
    with launching(source.device, "copy_rows"):
        _copy_kernel[(min(PROGRAMS, heads * tiles),)](
            of, to, words, of.stride(0), to.stride(0), heads, tiles, TILE=TILE, num_warps=WARPS, maxnreg=REGISTERS
        )


def _check(source: Tensor, target: Tensor) -> None:
    if source.shape != target.shape or source.dtype != target.dtype or source.device != target.device:
        raise ValueError(
            f"{source.dtype} {tuple(source.shape)} on {source.device} must be copied to the same, "
            f"not to {target.dtype} {tuple(target.shape)} on {target.device}"
        )
    if source.dim() != 4 or source.shape[2] != 2:
        raise ValueError(f"rows {tuple(source.shape)} must be [Hkv, n, 2, D]")
    dim = source.shape[3]
    if source.shape[1] * 2 * dim * source.element_size() > MOST_BYTES:
        raise ValueError(f"a head's rows of {tuple(source.shape)} {source.dtype} must be at most 8 GB at a time")
    for name, rows in (("source", source), ("target", target)):
        words = rows.stride(0) * rows.element_size() % 4 == 0 and rows.data_ptr() % 4 == 0
        if rows.stride()[1:] != (2 * dim, dim, 1) or not words or dim * rows.element_size() % 4:
            raise ValueError(f"a head's rows of {name} must be contiguous and whole words of 4 bytes")
