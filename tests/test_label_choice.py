"""Labels that are asked for, and those that come of it."""

from __future__ import annotations

from typing import Any

import pytest

from ds_offload.config import OffloadConfig
from ds_offload.errors import InputError
from ds_offload.kernels.label_codec import LabelLayout
from ds_offload.kernels.product_code import ProductLayout
from ds_offload.label_setting import label_layout, label_name


def resolved(head_dim: int = 64, codes: bool = True, **labels: Any) -> OffloadConfig:
    return OffloadConfig(**labels).resolve(head_dim=head_dim, layers=2, trained_context=4096, codes=codes)


@pytest.mark.parametrize(
    ("labels", "given", "layout", "name"),
    [
        ({}, {}, ProductLayout(64), "product code"),
        ({"label_code": "product"}, {}, ProductLayout(64), "product code"),
        ({"label_code": "product", "label_channels": 64}, {}, ProductLayout(64), "product code"),
        ({}, {"codes": False}, LabelLayout(28, 2), "28 x 2 bit"),
        ({}, {"head_dim": 30}, LabelLayout(12, 2), "12 x 2 bit"),
        ({"label_code": "scalar"}, {}, LabelLayout(28, 2), "28 x 2 bit"),
        ({"label_bits": 4}, {}, LabelLayout(14, 4), "14 x 4 bit"),
        ({"label_channels": 7}, {}, LabelLayout(7, 2), "7 x 2 bit"),
    ],
)
def test_chosen(labels: dict, given: dict, layout: Any, name: str) -> None:
    config = resolved(**given, **labels)
    assert label_layout(config) == layout
    assert label_name(config.label_code, config.label_channels, config.label_bits) == name
    again = config.resolve(head_dim=given.get("head_dim", 64), layers=2, trained_context=1)
    assert again == config


@pytest.mark.parametrize(
    ("labels", "given", "message"),
    [
        ({"label_code": "vector"}, {}, "label_code='vector' must be one of auto, product, scalar"),
        ({"label_bits": 2.0}, {}, "label_bits=2.0 must be one of the whole numbers 16, 8, 4, 2"),
        ({"label_bits": 3}, {}, "label_bits=3 must be one of the whole numbers 16, 8, 4, 2"),
        ({"label_code": "product", "label_bits": 2}, {}, "label_code='product' has no label_bits=2"),
        ({"label_code": "product", "label_channels": 28}, {}, "takes all 64 channels, not label_channels=28"),
        (
            {"label_code": "product"},
            {"head_dim": 30},
            "multiple of 4 channels, and this model's have 30",
        ),
        (
            {"label_code": "product", "calibration": "c"},
            {"codes": False},
            "a calibration with codes, and c has none",
        ),
        ({"label_channels": 65}, {}, "label_channels=65 is more than the head's 64 channels"),
    ],
)
def test_refused(labels: dict, given: dict, message: str) -> None:
    with pytest.raises(InputError) as caught:
        resolved(**given, **labels)
    assert message in str(caught.value) and "\n" not in str(caught.value)
