"""The PTX of look-ups, run by a machine of a dozen instructions, against sums over a label's parts."""

from __future__ import annotations

import numpy as np
import pytest
from ptx_machine import PtxMachine

from ds_offload.kernels.product_code import ProductLayout
from ds_offload.kernels.product_lookup import LARGEST_IN_BYTE, lookup_ptx, sum_words

# Head sizes whose labels have 1, 2, 4 and 8 words, whole and not.
DIMS = [4, 12, 20, 64, 80, 96, 128, 256]


def run_lookup(dim: int, heads: int, tokens: int, warps: int, largest: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Sums [tokens, words of sums, threads] as the PTX has them, and as they should be."""
    layout, threads, words = ProductLayout(dim), 32 * warps, sum_words(heads)
    random = np.random.default_rng(dim + heads)
    most = LARGEST_IN_BYTE if heads > 2 else 255
    numbers = random.integers(most + 1, size=(layout.parts, 16, heads)) if largest is None else np.full(
        (layout.parts, 16, heads), largest
    )  # fmt: skip
    shift = 8 if heads > 2 else 16
    table = sum(numbers[..., head] << shift * head for head in range(heads)).astype(np.uint32)
    labels = random.integers(16, size=(tokens, threads, 8 * (layout.row_bytes // 4)))
    labels[..., layout.parts :] = 0
    packed = sum(labels[..., n::8] << 4 * n for n in range(8))
    # The table stands behind other bytes.
    memory = np.concatenate((random.integers(256, size=48), table.view(np.uint8).flatten())).astype(np.uint8)
    operands: list[np.ndarray | None] = [None] * (words * tokens)
    operands += [packed[token, :, word] for word in range(packed.shape[2]) for token in range(tokens)]
    operands += [np.full(threads, 48)] * tokens
    machine = PtxMachine(threads, memory, operands)
    machine.run(lookup_ptx(layout.parts, layout.row_bytes // 4, heads, tokens, threads))
    found = np.array([[machine.values[f"${n * tokens + token}"] for n in range(words)] for token in range(tokens)])
    by_head = numbers[np.arange(layout.parts), labels[..., : layout.parts]].sum(-2)
    pairs = {1: [[0]], 2: [[0, 1]], 3: [[0, 2], [1]], 4: [[0, 2], [1, 3]]}[heads]
    expected = np.stack([sum(by_head[..., head] << 16 * n for n, head in enumerate(pair)) for pair in pairs], 1)
    return found, expected


@pytest.mark.parametrize("heads", [1, 2, 3, 4])
@pytest.mark.parametrize("dim", DIMS)
def test_sums(dim: int, heads: int) -> None:
    for tokens, warps in ((1, 1), (4, 1), (8, 1), (4, 4)):
        found, expected = run_lookup(dim, heads, tokens, warps, None)
        assert np.array_equal(found, expected)


@pytest.mark.parametrize(("heads", "largest"), [(1, 255), (2, 255), (3, 63), (4, 63)])
def test_the_largest_sums_stay_in_their_halves(heads: int, largest: int) -> None:
    found, expected = run_lookup(512, heads, 1, 1, largest)
    assert np.array_equal(found, expected)
