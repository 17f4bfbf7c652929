"""The labels that a user asks for: checked, and chosen where the model decides."""

from __future__ import annotations

from typing import Literal

from ds_offload.errors import InputError

LABEL_CODES = ("auto", "product", "scalar")
LABEL_BITS = (16, 8, 4, 2)
DEFAULT_LABEL_BITS = 2
# Channels of a part, as in kernels/product_code.py, which takes torch to import.
_PART = 4

Code = Literal["auto", "product", "scalar"]


def default_label_channels(head_dim: int, bits: int) -> int:
    """Channels such that a label spends 1/16 of a 16-bit key's bytes, rounded up to a multiple of 4.

    Labels are stored in rows of whole 32-bit words; the codes fill what the 8-bit scale leaves.
    """
    row_bits = -(-head_dim // 32) * 32
    scale_bits = 0 if bits == 16 else 8
    return min(head_dim, (row_bits - scale_bits) // bits)


def check_labels(code: str, bits: int | None, channels: int | None) -> None:
    """Refuse `label_code`, `label_bits` or `label_channels` that no model can have.

    Raises:
        InputError: One of them is out of range, or they do not go together.
    """
    if code not in LABEL_CODES:
        raise InputError(f"label_code={code!r} must be one of {', '.join(LABEL_CODES)}")
    if bits is not None and (not isinstance(bits, int) or bits not in LABEL_BITS):
        raise InputError(f"label_bits={bits!r} must be one of the whole numbers {', '.join(map(str, LABEL_BITS))}")
    if channels is not None and (isinstance(channels, bool) or not isinstance(channels, int) or channels < 1):
        raise InputError(f"label_channels={channels!r} must be a whole number of at least 1")
    if code == "product" and bits is not None:
        raise InputError(
            f"label_code='product' has no label_bits={bits}: a part of four channels takes 4 bits; "
            "leave label_bits out, or use label_code='scalar'"
        )


def choose_labels(
    code: Code, bits: int | None, channels: int | None, head_dim: int, codes: bool, calibration: str | None
) -> tuple[Code, int | None, int | None]:
    """`label_code`, `label_bits` and `label_channels` of a model.

    A product code has no bits, and all channels.

    Args:
        code, bits, channels: As given, checked.
        head_dim: Channels of one key.
        codes: Whether the calibration has, or will have, product codes.
        calibration: The file that the user named.

    Raises:
        InputError: Heads of that size, or that calibration, cannot have such labels.
    """
    if code == "product" and head_dim % _PART:
        raise InputError(
            f"label_code='product' takes heads of a multiple of {_PART} channels, and this model's have {head_dim}; "
            "use label_code='scalar'"
        )
    if code == "product" and not codes:
        raise InputError(
            f"label_code='product' needs a calibration with codes, and {calibration} has none; "
            "make one with `ds-offload calibrate --out FILE`, or use label_code='scalar'"
        )
    if code == "product" and channels not in (None, head_dim):
        raise InputError(
            f"label_code='product' takes all {head_dim} channels, not label_channels={channels}; "
            "leave label_channels out, or use label_code='scalar'"
        )
    if code == "product" or (code == "auto" and bits is None and channels is None and codes and head_dim % _PART == 0):
        return "product", None, head_dim
    bits = DEFAULT_LABEL_BITS if bits is None else bits
    channels = default_label_channels(head_dim, bits) if channels is None else channels
    if channels > head_dim:
        raise InputError(
            f"label_channels={channels} is more than the head's {head_dim} channels; use {head_dim} or fewer"
        )
    return "scalar", bits, channels
