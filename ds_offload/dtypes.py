"""The dtype names that users write, and how K/V of each are stored."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ds_offload.errors import InputError
from ds_offload.kernels.kv_codec import RowLayout

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
QUANTISED_BITS = {"int8": 8, "int4": 4}


@dataclass(frozen=True)
class RowFormat:
    """How K/V rows are kept.

    Attributes:
        dtype: Of rows that are not quantised: all of them without a layout, else those of the
            window, of new tokens and of dense layers.
        head_dim: D.
        layout: The bytes of quantised rows; None where the store has rows of `dtype`.
    """

    dtype: torch.dtype
    head_dim: int
    layout: RowLayout | None

    @classmethod
    def of(cls, kv_dtype: str, model_dtype: torch.dtype, head_dim: int) -> RowFormat:
        """What `kv_dtype` of a config means for a model; "auto" is the model's own dtype."""
        if kv_dtype in QUANTISED_BITS:
            return cls(model_dtype, head_dim, RowLayout(QUANTISED_BITS[kv_dtype], head_dim))
        return cls(model_dtype if kv_dtype == "auto" else torch_dtype(kv_dtype), head_dim, None)

    @property
    def store_dtype(self) -> torch.dtype:
        """Of the store's elements: bytes where rows are quantised."""
        return self.dtype if self.layout is None else torch.uint8

    @property
    def store_dim(self) -> int:
        """Elements of K, and of V, of a row of the store."""
        return self.head_dim if self.layout is None else self.layout.part_bytes

    @property
    def row_bytes(self) -> int:
        """Bytes of K and V of one token of one KV head in the store."""
        return 2 * self.store_dim * self.store_dtype.itemsize


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of "bf16", "fp16" or "fp32".

    Raises:
        InputError: Any other name.
    """
    if name not in DTYPES:
        raise InputError(f"dtype={name!r} is unknown; use one of {', '.join(DTYPES)}")
    return DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a floating dtype as users write it.

    Raises:
        InputError: A dtype that K/V are not stored in.
    """
    for name, known in DTYPES.items():
        if known == dtype:
            return name
    raise InputError(f"dtype {dtype} is not supported; use one of {', '.join(DTYPES)}")
