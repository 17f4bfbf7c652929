"""Config values that follow from others."""

from __future__ import annotations

from typing import Any

import pytest

from ds_offload.config import OffloadConfig
from ds_offload.errors import InputError
from ds_offload.kernels.label_codec import LabelLayout
from ds_offload.label_choice import default_label_channels


@pytest.mark.parametrize(
    ("head_dim", "bits", "channels", "row_bytes"),
    [
        (64, 2, 28, 8),
        (128, 2, 60, 16),
        (80, 2, 44, 12),
        (96, 2, 44, 12),
        (256, 2, 124, 32),
        (16, 2, 12, 4),
        (4, 2, 4, 4),
        (64, 4, 14, 8),
        (64, 8, 7, 8),
        (64, 16, 4, 8),
        (80, 16, 6, 12),
    ],
)
def test_default_label_channels_fill_their_rows(head_dim: int, bits: int, channels: int, row_bytes: int) -> None:
    assert default_label_channels(head_dim, bits) == channels
    assert LabelLayout(channels, bits).row_bytes == row_bytes


@pytest.mark.parametrize("field", ["calibration", "kv_dir"])
def test_an_empty_path_is_refused(field: str) -> None:
    """It would be the current folder."""
    with pytest.raises(InputError, match=f"{field}='' is empty; give a path"):
        OffloadConfig(**{field: ""})


@pytest.mark.parametrize("layers", [1, None, "0", [0, "1"], [True], [-1]])
def test_dense_layers_that_are_no_layer_numbers(layers: Any) -> None:
    with pytest.raises(InputError, match="must be layer numbers from 0, such as"):
        OffloadConfig(dense_layers=layers)
