"""Whether the software that the runtime stands on is there and works: each piece is really run."""

from __future__ import annotations

import importlib
import platform
from importlib import metadata
from typing import TYPE_CHECKING, Any

from ds_offload.machine.check import FAIL, OK, WARN, Check, attempt

if TYPE_CHECKING:
    import torch

# What pyproject.toml asks for.
TRANSFORMERS_MAJOR = "5"


def installed(package: str) -> str | None:
    """A package's version; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def check_python() -> Check:
    """The interpreter; one that is too old would not have come this far."""
    return Check("python", OK, f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def check_torch() -> Check:
    """torch imports and multiplies matrices on the CPU."""

    def work() -> str:
        import torch

        product = torch.ones(3, 5) @ torch.full((5, 2), 2.0)
        _expect(bool((product == 10).all()), "a product of matrices came out wrong")
        return torch.__version__

    return attempt("torch", work, "Install it again: pip install --force-reinstall 'torch>=2.11'.")


def check_cuda(device: torch.device) -> Check:
    """torch computes on the GPU, and the kernels may."""
    import torch

    from ds_offload.devices import unusable

    if device.type != "cuda":
        if torch.cuda.is_available():
            return Check("cuda", OK, f"{torch.version.cuda}, not used: --device cpu")
        if torch.version.cuda is None:
            cure = "To use a GPU, install a build of torch for CUDA; on the CPU the runtime works, slowly."
            return Check("cuda", WARN, "no CUDA device: this build of torch is for the CPU", cure)
        cure = "See whether nvidia-smi lists a GPU; in a container start it with --gpus all."
        return Check("cuda", WARN, f"no CUDA device (torch is built for CUDA {torch.version.cuda})", cure)

    def work() -> str:
        product = torch.ones(64, 64, device=device) @ torch.full((64, 64), 2.0, device=device)
        _expect(bool((product == 128).all()), "a product of matrices came out wrong on the GPU")
        major, minor = torch.cuda.get_device_capability(device)
        return f"{torch.version.cuda}, {torch.cuda.get_device_name(device)}, compute capability {major}.{minor}"

    check = attempt("cuda", work, "Install a driver that is new enough for this build of torch, or an older build.")
    reason = unusable(device) if check.status == OK else None
    if reason is not None:
        return Check("cuda", FAIL, reason, "Use another GPU, or --device cpu, which is slow.")
    return check


def check_driver(device: torch.device) -> Check:
    """The version of NVIDIA's driver."""
    from ds_offload.machine.gpu import driver_version

    version = driver_version()
    if version is not None:
        return Check("driver", OK, version)
    if device.type == "cuda":
        return Check("driver", OK, "version unknown: neither its kernel module nor nvidia-smi tells it")
    return Check("driver", WARN, "no NVIDIA driver", "To use a GPU, install NVIDIA's driver for it.")


def check_triton(device: torch.device) -> Check:
    """A Triton kernel compiles and gives the right numbers; tried on a CUDA device only."""
    version = installed("triton") or installed("triton-windows")
    if device.type != "cuda":
        return Check("triton", OK, f"{version or 'not installed'}, not tried: no CUDA device in use")

    def work() -> str:
        import torch

        from ds_offload.machine.triton_probe import scale, scale_reference

        source = torch.arange(1000, dtype=torch.float32, device=device)
        _expect(torch.equal(scale(source), scale_reference(source)), "the kernel gave wrong numbers")
        return f"{version}, a kernel was compiled and run"

    return attempt(
        "triton", work, "Install Triton and a C compiler (pip install 'triton>=3.6'; apt install gcc python3-dev)."
    )


def check_transformers() -> Check:
    """transformers imports, in a version that the runtime knows."""

    def work() -> str:
        # The package by itself imports next to nothing.
        importlib.import_module("transformers.models.llama.modeling_llama")
        return installed("transformers") or "unknown version"

    cure = "Install it again: pip install --force-reinstall 'transformers>=5.17,<6'."
    check = attempt("transformers", work, cure)
    if check.status == OK and check.value.split(".")[0] != TRANSFORMERS_MAJOR:
        return Check("transformers", WARN, f"{check.value}, not tried with this version", cure)
    return check


def check_numba() -> Check:
    """The project's gather on the CPU, a Numba kernel, gives the reference's rows."""

    def work() -> str:
        import torch

        from ds_offload.kernels.gather import gather_rows, gather_rows_reference
        from ds_offload.kernels.segment_table import SegmentTable

        segment = torch.arange(2 * 8 * 2 * 4, dtype=torch.float32).view(1, 2, 8, 2, 4)
        table = SegmentTable([[segment]], torch.tensor([[segment.data_ptr()]]), 8)
        tokens = torch.tensor([[[1, 4, 7], [0, -1, 6]]])
        slots = torch.tensor([[[0, 1, 2], [2, 1, 0]]])
        rows = [
            gather(table, 0, tokens, slots, torch.zeros(1, 2, 3, 2, 4))
            for gather in (gather_rows, gather_rows_reference)
        ]
        _expect(torch.equal(*rows), "the kernel gave wrong rows")
        return f"{installed('numba')}, a kernel was compiled and run"

    return attempt("numba", work, "Install it again: pip install --force-reinstall numba.")


def check_cupy(device: torch.device) -> Check | None:
    """cupy adds numbers on the GPU; None where it is not installed, which nothing here needs."""
    names = [name for name in ("cupy", "cupy-cuda12x", "cupy-cuda13x") if installed(name)]
    if not names:
        return None
    version = installed(names[0])
    if device.type != "cuda":
        return Check("cupy", OK, f"{version}, not tried: no CUDA device in use")

    def work() -> str:
        cupy: Any = importlib.import_module("cupy")
        with cupy.cuda.Device(device.index or 0):
            _expect(int(cupy.arange(10).sum()) == 45, "a sum came out wrong")
        return f"{version}, a kernel was run"

    return attempt("cupy", work, "Install the cupy of this CUDA version, or remove it: nothing here needs it.", WARN)


def _expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise RuntimeError(otherwise)
