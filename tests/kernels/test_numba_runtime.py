"""Compiling where nothing can be cached, and sharing work over threads."""

from __future__ import annotations

import threading
from itertools import chain
from typing import Any

import numba
import pytest
import torch

from ds_offload.kernels import numba_runtime
from ds_offload.kernels.numba_runtime import compiled, run_split


def double(value):
    return 2 * value


@pytest.mark.parametrize("error", [RuntimeError("no locator available"), OSError("no space left on device")])
def test_without_a_place_for_the_cache_it_compiles_and_says_so(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    notices: list[str] = []
    njit = numba.njit

    def refusing(*args: Any, cache: bool = False, **options: Any) -> Any:
        if cache:
            raise error
        return njit(*args, **options)

    monkeypatch.setattr(numba, "njit", refusing)
    monkeypatch.setattr(numba_runtime, "notice", notices.append)
    assert compiled("int64(int64)")(double)(21) == 42
    assert len(notices) == 1 and str(error) in notices[0] and "NUMBA_CACHE_DIR" in notices[0]


@pytest.mark.parametrize("items", [0, 1, 2, 7, 100])
@pytest.mark.parametrize(("torch_threads", "most_threads"), [(1, 9), (4, 0), (4, 3), (4, 4), (4, 9)])
def test_shares_cover_every_item_once(
    items: int, torch_threads: int, most_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: torch_threads)
    names = []

    def part(first: int, last: int) -> list[int]:
        names.append(threading.current_thread().name)
        return list(range(first, last))

    shares = run_split(part, items, most_threads)
    assert list(chain(*shares)) == list(range(items))
    assert len(shares) == len(names) == max(1, min(items, torch_threads, most_threads))
    assert threading.main_thread().name in names


def test_an_error_in_a_share_reaches_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)

    def part(first: int, last: int) -> None:
        if first:
            raise ArithmeticError(f"share {first} to {last}")

    with pytest.raises(ArithmeticError, match="share 5 to 10"):
        run_split(part, 10, 2)
