"""The CPU's gather: rows read straight from every segment by address, as the CUDA kernel does.

One flat `index_select` is as fast, but needs the whole store in one tensor; one per
segment is many times slower. Import this module at first use: it loads Numba.
"""

from __future__ import annotations

from typing import Any

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from ds_offload.kernels.numba_runtime import compiled, run_split

# About half a millisecond.
BYTES_PER_THREAD = 4 << 20


def _memcpy(typing_context: Any, target: Any, source: Any, count: Any) -> Any:
    """Copy `count` bytes between two addresses."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = context.get_value_type(types.voidptr)
        target_at, source_at = (builder.inttoptr(address, pointer) for address in arguments[:2])
        cgutils.raw_memcpy(builder, target_at, source_at, arguments[2], 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


_copy_bytes: Any = intrinsic(_memcpy)


@compiled(
    "int64(int64[:,::1], int64[:,:,::1], int64[:,:,::1], int64, int64, UniTuple(int64, 3), int64, int64, int64,"
    "int64, int64)"
)
def _copy_rows(
    addresses, tokens, slots, out, capacity, strides, row_bytes, layer, segment_tokens, first_entry, last_entry
):
    """Copies the entries that have a segment and a slot; returns the number that have not."""
    heads, kept = tokens.shape[1:]
    missing = 0
    for pair in range(first_entry // kept, (last_entry - 1) // kept + 1):
        b, h = pair // heads, pair % heads
        out_rows = out + b * strides[0] + h * strides[1]
        head_row = (layer * heads + h) * segment_tokens
        for i in range(max(0, first_entry - pair * kept), min(kept, last_entry - pair * kept)):
            token, slot = tokens[b, h, i], slots[b, h, i]
            if token >= 0:
                segment = token // segment_tokens
                if segment >= addresses.shape[1] or addresses[b, segment] == 0 or slot < 0 or slot >= capacity:
                    missing += 1
                else:
                    row = head_row + token - segment * segment_tokens
                    _copy_bytes(out_rows + slot * strides[2], addresses[b, segment] + row * row_bytes, row_bytes)
    return missing


def gather_by_address(
    addresses: Tensor, tokens: Tensor, slots: Tensor, words: Tensor, layer: int, segment_tokens: int
) -> int:
    """`gather_rows` into `words`, the int32 view [B, Hkv, C, row words] of its result; every argument checked.

    Returns:
        The number of entries whose token has no segment or whose slot does not exist;
        they are not copied.
    """
    if tokens.numel() == 0:
        return 0
    arrays = [value.contiguous().numpy() for value in (addresses, tokens, slots)]
    strides = (4 * words.stride(0), 4 * words.stride(1), 4 * words.stride(2))
    target, capacity, row_bytes = words.data_ptr(), words.shape[2], 4 * words.shape[3]

    def part(first: int, last: int) -> int:
        return int(_copy_rows(*arrays, target, capacity, strides, row_bytes, layer, segment_tokens, first, last))

    return sum(run_split(part, tokens.numel(), tokens.numel() * row_bytes // BYTES_PER_THREAD))
