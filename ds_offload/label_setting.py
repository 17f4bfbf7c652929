"""What labels a resolved config asks for: their layout, their name, and the code that makes them."""

from __future__ import annotations

import torch

from ds_offload.calibration_file import Calibration
from ds_offload.config import OffloadConfig
from ds_offload.errors import InputError
from ds_offload.kernels.label_codec import LabelLayout
from ds_offload.kernels.product_code import ProductLayout
from ds_offload.memory.label_code import LabelCode, ProductLabels, ScalarLabels


def label_layout(config: OffloadConfig) -> LabelLayout | ProductLayout:
    """How one token's label is stored."""
    assert config.label_channels is not None, "the config is resolved"
    return ProductLayout(config.label_channels) if config.label_code == "product" else _scalar(config)


def label_name(label_code: str, label_channels: int | None, label_bits: int | None) -> str:
    """The labels in a few words, for tables and lines."""
    return "product code" if label_code == "product" else f"{label_channels} x {label_bits} bit"


def make_label_code(config: OffloadConfig, calibration: Calibration, device: torch.device) -> LabelCode:
    """The code of all layers, on the device that labels live on.

    Raises:
        InputError: It is a product code, and the calibration has none.
    """
    if config.label_code != "product":
        return ScalarLabels(_scalar(config), calibration.channels, calibration.key_mean, device)
    if calibration.codes is None:
        raise InputError(
            f"the calibration of {calibration.text} has no product codes; make another one with "
            "`ds-offload calibrate`, or set --label-code scalar"
        )
    return ProductLabels(calibration.codes, device)


def _scalar(config: OffloadConfig) -> LabelLayout:
    assert config.label_channels is not None and config.label_bits is not None, "the config is resolved"
    return LabelLayout(config.label_channels, config.label_bits)
