"""Which layers' new rows leave together."""

from __future__ import annotations

import pytest

from ds_offload.context_stores import write_parts


@pytest.mark.parametrize("layers", [0, 1, 2, 3, 5, 30, 32, 80])
def test_every_layer_leaves_once_in_order(layers: int) -> None:
    parts = write_parts(layers)
    assert [layer for part in parts for layer in range(layers)[part]] == list(range(layers))
    assert all(part.start < part.stop for part in parts)


def test_all_but_the_last_layers_leave_while_others_compute() -> None:
    assert [part.stop for part in write_parts(32)] == [16, 24, 28, 30, 32]
