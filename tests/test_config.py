"""Config values that follow from others."""

from __future__ import annotations

import pytest

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
