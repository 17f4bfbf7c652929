"""How the CPU kernels are compiled and run. Importing this loads Numba, which takes a second.

Kernels are compiled for one thread and release the GIL; large work is split over plain
Python threads. Numba's own parallel loops would start a second pool of OpenMP threads
that spin against torch's: on two busy cores a kernel of 0.1 ms then took 8 ms.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numba
import torch

from ds_offload.notices import notice


def compiled(signature: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`numba.njit` for one signature, without the GIL.

    The machine code is kept in Numba's cache: beside the source, or in the user's cache
    folder where the install is read-only. Where neither can be written, a notice says so.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            return numba.njit(signature, nogil=True, cache=True)(function)
        except (RuntimeError, OSError) as error:
            notice(f"Numba compiles at every start ({error}); set NUMBA_CACHE_DIR to a folder that can be written")
            return numba.njit(signature, nogil=True)(function)

    return decorate


def run_split(part: Callable[[int, int], Any], items: int, most_threads: int) -> list[Any]:
    """Call part(first, last) over contiguous shares of range(items), one thread each.

    Args:
        part: Called once per share; the shares are disjoint and cover all items.
        items: Number of items.
        most_threads: Threads that the amount of work is worth: starting one takes about
            0.1 ms. Never more than torch uses are started.

    Returns:
        What each call returned, in order.
    """
    shares = max(1, min(torch.get_num_threads(), most_threads, items))
    if shares == 1:
        return [part(0, items)]
    bounds = [items * n // shares for n in range(shares + 1)]
    with ThreadPoolExecutor(shares - 1) as pool:
        others = [pool.submit(part, first, last) for first, last in pairwise(bounds[1:])]
        return [part(bounds[0], bounds[1]), *(other.result() for other in others)]
