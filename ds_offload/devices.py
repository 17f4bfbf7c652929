"""Which device computes."""

from __future__ import annotations

import torch

from ds_offload.errors import InputError

# What Triton is made for: A100, RTX 30 and newer. Older ones lack shared memory for some kernels, and bfloat16.
LEAST_CAPABILITY = (8, 0)


def resolve_device(name: str) -> torch.device:
    """The torch device of "auto", "cpu", "cuda" or "cuda:N".

    Raises:
        InputError: Another name, or a CUDA device that is not there or cannot run the kernels.
    """
    device = find_device(name)
    reason = unusable(device)
    if reason is not None:
        raise InputError(f"{reason}; use --device cpu")
    return device


def unusable(device: torch.device) -> str | None:
    """Why a CUDA device cannot run the kernels; None where it can, and for a CPU."""
    if device.type != "cuda":
        return None
    if torch.version.hip is not None:
        return "this build of torch is for AMD's GPUs, and the kernels are for NVIDIA's"
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        (major, minor), (least, _) = capability, LEAST_CAPABILITY
        name = torch.cuda.get_device_name(device)
        return f"{name} has compute capability {major}.{minor}, and {least}.0 is needed (A100, RTX 30 or newer)"
    return None


def find_device(name: str) -> torch.device:
    """`resolve_device`, whatever the device can do."""
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
