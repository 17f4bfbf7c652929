"""Host memory that the GPU reads through large pages: CUDA's managed memory, which stays on the host.

A kernel that reads a row here and a row there waits for the device's tables of pages. Those of page-locked memory
have an entry for every 4 KiB, 128 MiB of them for a store of 64 GiB, and the weights that a step reads evict them from
the device's cache. Managed memory is mapped in pieces of 2 MiB where the system has such pages.
"""

from __future__ import annotations

import ctypes
import functools
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ds_offload.machine.numa import say_placed, wanted_node
from ds_offload.memory import page_locking
from ds_offload.notices import notice

# From CUDA's headers: cudaDevAttrConcurrentManagedAccess, cudaMemAttachGlobal, and two advices with their locations.
_CONCURRENT_ACCESS = 89
_ATTACH_GLOBAL = 1
_PREFERRED_LOCATION, _ACCESSED_BY = 3, 5
_DEVICE, _HOST, _HOST_NODE = 1, 2, 3
# Smaller allocations have nothing of large pages.
LARGE_PAGE = 2 << 20


class _Location(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


@dataclass(frozen=True)
class _DeviceBytes:
    """What `torch.as_tensor` asks memory for."""

    address: int
    size: int

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"data": (self.address, False), "shape": (self.size,), "typestr": "|u1", "strides": None, "version": 3}


# By address: the bytes of each allocation as a tensor of the device.
_on_device: dict[int, Tensor] = {}


@functools.cache
def supported(device: torch.device) -> bool:
    """Whether host and device may use managed memory at once: not on WSL, on Windows, or on some virtual GPUs."""
    runtime, driver = page_locking.cuda_runtime(), _driver()
    if device.type != "cuda" or runtime is None or driver is None:
        return False
    value = ctypes.c_int(0)
    code = runtime.cudaDeviceGetAttribute(ctypes.byref(value), _CONCURRENT_ACCESS, device.index or 0)
    return code == 0 and value.value == 1


def allocate(device: torch.device, size: int) -> int | None:
    """Address of `size` bytes that read zeros, take no memory until they are touched, and stay on the host.

    `device` maps what the CPU has touched, and reads and writes it in place. On a machine with several NUMA nodes it
    comes from the device's. None where it is smaller than a large page, or, which is said once, not `supported` or
    refused by the driver; nothing is pending then.
    """
    if size < LARGE_PAGE:
        return None
    if not supported(device):
        _say_locked("CPU and GPU cannot use managed memory at once here")
        return None
    runtime, driver = page_locking.cuda_runtime(), _driver()
    assert runtime is not None and driver is not None
    pointer = ctypes.c_void_p()
    with torch.cuda.device(device):
        torch.cuda.init()
        if runtime.cudaMallocManaged(ctypes.byref(pointer), ctypes.c_size_t(size), _ATTACH_GLOBAL):
            page_locking.clear_error()
            _say_locked("the driver refused managed memory")
            return None
        address = int(pointer.value or 0)
        node = wanted_node(device)
        home = _Location(_HOST, 0) if node is None else _Location(_HOST_NODE, node)
        for advice, location in ((_PREFERRED_LOCATION, home), (_ACCESSED_BY, _Location(_DEVICE, device.index or 0))):
            if driver.cuMemAdvise_v2(ctypes.c_uint64(address), ctypes.c_size_t(size), advice, location):
                free(device, address)
                _say_locked("the driver refused to keep managed memory on the host")
                return None
        view = torch.as_tensor(_DeviceBytes(address, size), device=device)
    if view.data_ptr() != address:
        # A copy: torch took it for memory of another device.
        free(device, address)
        _say_locked("torch does not take managed memory for this device's")
        return None
    _on_device[address] = view
    if node is not None:
        say_placed(device, node)
    return address


def free(device: torch.device, address: int) -> None:
    """Give an allocation back; neither host nor device may use it any more."""
    _on_device.pop(address, None)
    runtime = page_locking.cuda_runtime()
    assert runtime is not None
    with torch.cuda.device(device):
        if runtime.cudaFree(ctypes.c_void_p(address)):
            page_locking.clear_error()


def on_device(tensor: Tensor) -> Tensor | None:
    """The bytes of the allocation that a CPU tensor begins, uint8 on its device; None where there is none.

    Copies between the device and managed memory go through this: of the CPU's tensor CUDA makes copies that pass
    through another buffer, four times as slow, and the host waits for them.
    """
    return _on_device.get(tensor.data_ptr())


@functools.cache
def _say_locked(reason: str) -> None:
    notice(f"the K/V is page-locked, since {reason}: rows that lie far apart arrive slower")


@functools.cache
def _driver() -> ctypes.CDLL | None:
    """The driver's library, where it knows advice about locations (CUDA 12.2); None otherwise."""
    if os.name == "nt":
        return None
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    return driver if hasattr(driver, "cuMemAdvise_v2") else None
