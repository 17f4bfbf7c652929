"""Copied rows: each head's arrive at its place, every other byte stays, on the device and in managed host memory."""

from __future__ import annotations

import pytest
import torch

from ds_offload.kernels import copy_rows as module
from ds_offload.kernels.copy_rows import copy_rows
from ds_offload.memory import managed_memory
from ds_offload.memory.pinned_pool import PinnedPool

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
SHAPES = [(1, 1, 8), (3, 7, 16), (2, 1, 64), (32, 5, 128), (4, 1024, 128), (5, 333, 80)]
# Tokens around those that are copied, in source and target.
BEFORE, AROUND = 3, 9


def rows_of(heads: int, tokens: int, dim: int, dtype: torch.dtype, device: torch.device, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 100, (heads, tokens, 2, dim), generator=generator).to(dtype).to(device)


def copies(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, target: torch.Tensor | None) -> None:
    heads, tokens, dim = shape
    whole = rows_of(heads, tokens + AROUND, dim, dtype, device, seed=1)
    source = whole[:, AROUND - BEFORE :][:, :tokens]
    into = rows_of(heads, tokens + AROUND, dim, dtype, device, seed=2)
    if target is not None:
        target.copy_(into)
        into = target
    expected = into.clone()
    expected[:, BEFORE : BEFORE + tokens] = source
    copy_rows(source, into[:, BEFORE : BEFORE + tokens])
    assert torch.equal(into, expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_arrive_on_a_cpu(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    copies(shape, dtype, CPU, None)


@pytest.mark.gpu
@pytest.mark.parametrize("programs", [1, 2, 7])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_rows_arrive_on_a_gpu(
    shape: tuple[int, int, int], dtype: torch.dtype, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PROGRAMS", programs)
    copies(shape, dtype, CUDA, None)
    heads, tokens, dim = shape
    elements = heads * (tokens + AROUND) * 2 * dim
    with PinnedPool(CUDA, in_place=True) as pool:
        view = managed_memory.on_device(pool.allocate(elements * dtype.itemsize))
        assert view is not None
        target = view[: elements * dtype.itemsize].view(dtype).view(heads, tokens + AROUND, 2, dim)
        copies(shape, dtype, CUDA, target)
        torch.cuda.synchronize()


@pytest.mark.gpu
def test_offsets_beyond_32_bits() -> None:
    whole = torch.zeros(3, 1 << 22, 2, 128, dtype=torch.bfloat16, device=CUDA)
    target = whole[:, 5:12]
    source = rows_of(3, 7, 128, torch.bfloat16, CUDA, seed=0)
    copy_rows(source, target)
    assert torch.equal(whole[:, 5:12], source) and int(whole[2, :5].count_nonzero()) == 0


def test_nothing_to_copy() -> None:
    rows = torch.zeros(2, 0, 2, 8)
    copy_rows(rows, rows.clone())


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (torch.zeros(2, 3, 2, 8), torch.zeros(2, 4, 2, 8)),
        (torch.zeros(2, 3, 2, 8), torch.zeros(2, 3, 2, 8, dtype=torch.bfloat16)),
        (torch.zeros(2, 3, 8), torch.zeros(2, 3, 8)),
        (torch.zeros(3, 2, 2, 8).transpose(0, 1), torch.zeros(2, 3, 2, 8)),
        (torch.zeros(2, 3, 2, 8), torch.zeros(2, 6, 2, 8)[:, ::2]),
        (torch.zeros(2, 3, 2, 3, dtype=torch.bfloat16), torch.zeros(2, 3, 2, 3, dtype=torch.bfloat16)),
    ],
)
def test_what_does_not_fit_is_refused(source: torch.Tensor, target: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"rows|copied"):
        copy_rows(source, target)


def test_more_words_than_are_counted_are_refused() -> None:
    rows = torch.empty(1, 8_000_000, 2, 256, dtype=torch.bfloat16, device="meta")
    with pytest.raises(ValueError, match="at most 8 GB at a time"):
        copy_rows(rows, rows)
