"""Where K/V rows lie: the segments of every sequence, and the address of a row inside a kernel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ds_offload.kernels.triton_runtime import jit, tl


@dataclass(frozen=True)
class SegmentTable:
    """Where the K/V rows of B sequences lie.

    Token t of sequence b is row t % S of segment t // S. The lists and `addresses` may
    be filled in as sequences grow; whoever adds a segment writes its address too.

    Attributes:
        tensors: [B][n] tensors [L, Hkv, S, 2, D], contiguous, of one dtype: pinned host
            memory, plain host memory or device memory.
        addresses: int64 [B, max_segments] on the compute device: each segment's
            `data_ptr()`, a multiple of 16, and 0 where there is none. CUDA kernels
            reach the rows through these, so pinned memory is read in place.
        segment_tokens: S.
    """

    tensors: list[list[Tensor]]
    addresses: Tensor
    segment_tokens: int

    def check(self, layer: int, batch: int, row: tuple[int, int], dtype: torch.dtype) -> None:
        """Raise ValueError unless the table has `batch` sequences with rows of that shape.

        Args:
            layer: Layer that is to be reached.
            batch: B.
            row: (Hkv, D) of the rows to exchange.
            dtype: Their dtype.
        """
        if len(self.tensors) != batch or self.addresses.shape[:1] != (batch,) or self.addresses.dim() != 2:
            raise ValueError(
                f"the table has {len(self.tensors)} sequences and addresses {tuple(self.addresses.shape)}; "
                f"the rows are of {batch}"
            )
        if self.addresses.dtype != torch.int64 or not self.addresses.is_contiguous():
            raise ValueError("addresses must be int64 and contiguous")
        segment = next((segments[0] for segments in self.tensors if segments), None)
        if segment is None:
            return
        shape = (segment.shape[0], row[0], self.segment_tokens, 2, row[1])
        if segment.shape != shape or segment.dtype != dtype:
            raise ValueError(f"segments are {segment.dtype} {tuple(segment.shape)}; the rows need {dtype} {shape}")
        if segment.data_ptr() % 16:
            raise ValueError(f"segments must begin at a multiple of 16 bytes, not at {segment.data_ptr():#x}")
        if not 0 <= layer < segment.shape[0]:
            raise ValueError(f"layer={layer} is not one of the table's {segment.shape[0]} layers")


@jit
def row_address(
    addresses,
    b,
    h,
    token,
    live,
    layer,
    heads,
    segments,
    SEGMENT_TOKENS: tl.constexpr,
    ROW_BYTES: tl.constexpr,
):
    """Where tokens' rows lie, for use inside a kernel: int64 addresses, 0 where there is no row.

    Args:
        addresses: Pointer to int64 [B, segments], see `SegmentTable`.
        b, h, token: Integer tensors of one shape: sequence, KV head, token number.
        live: bool of that shape; where it is false nothing is read and the result is 0.
    """
    live = live & (token < segments * SEGMENT_TOKENS)
    # A division in 32 bits is several times faster than in 64.
    token = tl.where(live, token, 0).to(tl.int32)
    base = tl.load(addresses + b * segments + token // SEGMENT_TOKENS, mask=live, other=0)
    row = (h.to(tl.int64) + layer * heads) * SEGMENT_TOKENS + token % SEGMENT_TOKENS
    return tl.where(base != 0, base + row * ROW_BYTES, 0)
