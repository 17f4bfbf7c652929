"""Launches of the CUDA kernels of `select_tokens` (kernels/select.py)."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class SelectLaunch:
    """Launch of the CUDA kernels: of the first kind below whose size is not 0.

    Attributes:
        block: Tokens of a row that one program holds, at least the row; one launch.
        part: Tokens of one of a row's programs, 16 to 32,768; one launch, whose programs
            wait for each other.
        chunk: Tokens per program, below 2 ** 15: counts of a chunk are packed in 16 bits;
            four launches, of which three have 8 warps.
        warps: Warps of a program.
        sample: Tokens of a row from which its threshold is bracketed.
        listed: Scores of a row inside the bracket that fit in its list, below 2 ** 16.
        width: Chunks of a row whose counts are summed at a time.
        apart: Whether what waits is a launch of its own, the second of two.
    """

    block: int = 0
    part: int = 0
    chunk: int = 2048
    warps: int = 16
    sample: int = 4096
    listed: int = 8192
    width: int = 512
    apart: bool = False

    def parts(self, length: int) -> int:
        """Programs of a row of `length` tokens."""
        return 1 if self.block else -(-length // (self.part or self.chunk))


# Samples, list, and warps of a program that holds either, the fastest first.
_BRACKETS = ((4096, 8192, 8), (8192, 16384, 16), (16384, 32768, 16))
# The same where a row's programs wait for each other, and how many there are of all rows at most: two for each of an
# H100's multiprocessors, of which one holds 32,768 tokens. More have to wait for a place, and four launches are faster.
_PART_BRACKETS = ((4096, 8192), (8192, 8192), (8192, 16384))
_PROCESSORS = 132


def select_launch(rows: int, length: int, count: int) -> SelectLaunch:
    """The launch for `rows` rows of `length` tokens of which `count` are kept at most.

    16,384 scores are 32 registers a thread of 16 warps: rows up to that take one launch of
    one program each. For longer rows, a bracket of five standard deviations to each side
    must fit in the list with room to spare; the smallest sample and list that allow it are
    the fastest. Where none does, the bracket is narrowed to fit the last, so it misses more
    often. In four launches 32 rows of 131,072 took an H100 56 us with the first of
    `_BRACKETS` and 60 us with the second.
    """
    if length <= 4096:
        return SelectLaunch(block=4096, warps=8)
    if length <= 16384:
        return SelectLaunch(block=16384)
    for sample, listed in _PART_BRACKETS:
        # 4.5 of them, since what is listed at most is three quarters of the list.
        if 0.3 * listed * sample / length < _spread(length, count, sample, 4.5):
            continue
        for part in (8192, 16384, 32768):
            launch = SelectLaunch(part=part, warps=part // 1024, sample=sample, listed=listed)
            programs = rows * launch.parts(length)
            if programs <= _PROCESSORS or (part == 32768 and programs <= 2 * _PROCESSORS):
                return launch
    for sample, listed, warps in _BRACKETS:  # noqa: B007
        if 2.5 * _spread(length, count, sample, 5) * length / sample <= 0.6 * listed:
            break
    return SelectLaunch(warps=warps, sample=sample, listed=listed)


def select_scratch_bytes(rows: int, length: int) -> int:
    """Bytes that the programs of a launch take at most to exchange what they find; never less for a longer row."""
    return 0 if length <= 16384 else 4 * (rows * (16 + 3 * -(-length // 2048) + 32768) + 4)


def _spread(length: int, count: int, sample: int, deviations: float) -> float:
    """By how much the rank of a row's threshold in a sample may be off."""
    rank = min(sample, count * sample / length)
    return deviations * math.sqrt(rank * (1 - rank / sample)) + 3
