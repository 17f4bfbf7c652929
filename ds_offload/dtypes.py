"""The dtype names that users write."""

from __future__ import annotations

import torch

from ds_offload.errors import InputError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


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
