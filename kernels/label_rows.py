"""Device code that reads labels, of either code, as words of 32 bits."""

from __future__ import annotations

from ds_offload.kernels.triton_runtime import jit, tl


@jit
def vector_words(words, live, VECTOR: tl.constexpr, BLOCK: tl.constexpr):
    """VECTOR words from each of BLOCK pointers: a tuple of uint32 [BLOCK], 0 where not live.

    A thread reads its VECTOR words at once and keeps them: taking the vector apart moves nothing.
    """
    if VECTOR == 1:
        return (tl.load(words, mask=live, other=0),)
    else:  # noqa: RET505 - the branch is chosen when it is compiled
        pointers = words[:, None] + tl.arange(0, VECTOR)[None, :]
        # Offsets are not known when it is compiled; without the hint it reads word by word.
        pointers = tl.multiple_of(pointers, [1, 4 * VECTOR])
        tile = tl.load(pointers, mask=live[:, None], other=0)
        if VECTOR == 2:
            return tl.split(tile)
        else:  # noqa: RET505
            even, odd = tl.split(tl.reshape(tile, [BLOCK, 2, 2]))
            first, third = tl.split(even)
            second, fourth = tl.split(odd)
            return (first, second, third, fourth)


@jit
def row_words(rows, live, WORDS: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr):
    """The words of BLOCK rows: a tuple of WORDS uint32 [BLOCK], 0 where not live."""
    words = vector_words(rows, live, VECTOR, BLOCK)
    for first in tl.static_range(VECTOR, WORDS, VECTOR):
        words = words + vector_words(rows + first, live, VECTOR, BLOCK)
    return words
