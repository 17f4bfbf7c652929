"""Page-locking of host memory: CUDA's calls, and the words for a refusal."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os

import torch

from ds_offload.machine.host_memory import memlock_limit

CURE = (
    "to have it locked run `ulimit -l unlimited` first, start docker with --ulimit memlock=-1, give WSL more memory "
    "in .wslconfig, free host memory, or shorten the context"
)


def lock_pages(device: torch.device, address: int, size: int) -> int:
    """Page-lock memory for `device`, without the interpreter lock; CUDA's code, 0 when done, cleared otherwise."""
    with torch.cuda.device(device):
        code = int(torch.cuda.cudart().cudaHostRegister(address, size, 0))
        if code:
            clear_error()
    return code


def unlock_pages(device: torch.device, address: int) -> None:
    """Undo `lock_pages` of the memory that begins at `address`."""
    with torch.cuda.device(device):
        if int(torch.cuda.cudart().cudaHostUnregister(address)):
            clear_error()


def synchronize(device: torch.device) -> None:
    """Wait for the device: nothing that it may still read or write is unlocked."""
    torch.cuda.synchronize(device)


def refusal_text(size: int, held: int, code: int) -> str:
    """That `size` bytes were refused after `held` were taken, and why."""
    limit = memlock_limit()
    memlock = "unlimited" if limit is None else f"{limit / 2**10:,.0f} KiB"
    return (
        f"the driver refused to page-lock {size / 2**20:.0f} MiB of host memory after {held / 2**30:.2f} GiB "
        f"({_error_text(code)}; memlock is {memlock})"
    )


def clear_error() -> None:
    """Take a failed call's code off this thread, where the next kernel launch would take it for its own.

    CUDA keeps the code for each thread, so the thread that made the call clears it.
    """
    runtime = cuda_runtime()
    if runtime is not None:
        runtime.cudaGetLastError()
        return
    # torch asks for the code behind every launch of its own, which clears it.
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device="cuda").add_(1)


@functools.cache
def cuda_runtime() -> ctypes.CDLL | None:
    """The runtime library that torch has loaded, whose `cudaGetLastError` torch does not pass on; None if not found."""
    version, only_loaded = torch.version.cuda, getattr(os, "RTLD_NOLOAD", None)
    if version is None or only_loaded is None:
        return None
    try:
        return ctypes.CDLL(f"libcudart.so.{version.split('.')[0]}", mode=only_loaded)
    except OSError:
        return None


def _error_text(code: int) -> str:
    try:
        runtime = torch.cuda.cudart()
        return f"CUDA error {code}: {runtime.cudaGetErrorString(runtime.cudaError(code))}"
    except Exception:
        # The text is a courtesy; without a working runtime there is the number.
        return f"CUDA error {code}"
