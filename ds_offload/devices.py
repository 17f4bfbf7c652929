"""Which device computes."""

from __future__ import annotations

import torch

from ds_offload.errors import InputError


def resolve_device(name: str) -> torch.device:
    """The torch device of "auto", "cpu", "cuda" or "cuda:N".

    Raises:
        InputError: Another name, or a CUDA device that is not there.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if count else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device={name!r} is unknown; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        index = device.index or 0
        if count == 0:
            raise InputError(f"device={name!r} was asked for and no CUDA device is there; use --device cpu or auto")
        if index >= count:
            raise InputError(f"device={name!r} was asked for and there are {count} CUDA devices, numbered from 0")
        return torch.device("cuda", index)
    return torch.device("cpu")
