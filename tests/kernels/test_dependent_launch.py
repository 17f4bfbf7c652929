"""Kernels of a step read nothing before the kernel in front of them has ended, though they begin before it does."""

from __future__ import annotations

import ast
import ctypes
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ds_offload.kernels.dependent_launch import CAPTURING_DRIVER, has_dependent_launches
from ds_offload.kernels.triton_runtime import HAS_TRITON

if HAS_TRITON:
    from dependent_kernels import hasty_kernel, late_kernel, reading_kernel

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
# Of prompts, of rows that are quantised on their way out, and of clocks.
OTHERS = {
    *("_copy_kernel", "_prompt_rows_kernel", "_rms_norm_kernel", "_swiglu_kernel"),
    *("encode_kernel", "decode_kernel", "_stamp_kernel"),
}
LATE = 20_000_000
PROGRAMS = 4

needs_dependent_launches = pytest.mark.skipif(
    torch.cuda.is_available() and not has_dependent_launches(0),
    reason="no dependent launches here",
)


def entry_points() -> list[tuple[str, ast.FunctionDef]]:
    found = []
    for path in sorted(KERNELS.glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel") and node.decorator_list:
                decorator = node.decorator_list[0]
                found.append((ast.unparse(getattr(decorator, "func", decorator)), node))
    return found


def test_every_kernel_of_a_step_waits_first() -> None:
    kernels = [node for decorator, node in entry_points() if decorator == "step_kernel"]
    assert len(kernels) > 25
    for node in kernels:
        statements = node.body[1:] if ast.get_docstring(node) else node.body
        assert ast.unparse(statements[0]) == "follow()", node.name


def test_no_other_kernel_is_one_of_a_step() -> None:
    assert {node.name for decorator, node in entry_points() if decorator == "jit"} == OTHERS


@pytest.mark.parametrize(
    ("cuda", "capability", "driver", "expected"),
    [
        ("13.0", (9, 0), 13000, True),
        ("12.6", (9, 0), CAPTURING_DRIVER, True),
        ("12.6", (9, 0), CAPTURING_DRIVER - 10, False),
        ("13.0", (8, 9), 13000, False),
        ("13.0", (9, 0), None, False),
        (None, (9, 4), 13000, False),
    ],
)
def test_devices_and_drivers_that_have_them(
    cuda: str | None, capability: tuple[int, int], driver: int | None, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(pointer: Any) -> int:
        pointer._obj.value = driver
        return 0

    def library(name: str) -> Any:
        if driver is None:
            raise OSError(name)
        return SimpleNamespace(cuDriverGetVersion=version)

    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(ctypes, "CDLL", library)
    assert has_dependent_launches.__wrapped__(0) is expected


def read_after_a_late_kernel(reader: Any, value: int, as_graph: bool) -> torch.Tensor:
    """What `reader` reads of numbers that a kernel before it writes 20 ms after it begins."""
    written = torch.zeros(PROGRAMS * 32, dtype=torch.int32, device="cuda")
    read = torch.full_like(written, -1)

    def chain() -> None:
        late_kernel[(PROGRAMS,)](written, value, LATE, num_warps=1)
        reader[(PROGRAMS,)](written, read, num_warps=1)

    chain()  # Compiles.
    torch.cuda.synchronize()
    launch = chain
    if as_graph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            chain()
        launch = graph.replay
    written.zero_()
    read.fill_(-1)
    torch.cuda.synchronize()
    launch()
    torch.cuda.synchronize()
    assert (written == value).all()
    return read


@pytest.mark.gpu
@needs_dependent_launches
@pytest.mark.parametrize("as_graph", [False, True])
def test_cuda_a_kernel_waits_for_a_late_one(as_graph: bool) -> None:
    for value in range(1, 4):
        assert (read_after_a_late_kernel(reading_kernel, value, as_graph) == value).all()


@pytest.mark.gpu
@needs_dependent_launches
@pytest.mark.parametrize("as_graph", [False, True])
def test_cuda_without_the_wait_it_reads_too_early(as_graph: bool) -> None:
    assert (read_after_a_late_kernel(hasty_kernel, 5, as_graph) == 0).all()
