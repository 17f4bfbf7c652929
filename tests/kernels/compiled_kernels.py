"""Kernels compiled and not run, for GPUs that need not be there; run by test_compiled_kernels.py in its own process."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from arriving_case import SCALING, make_arriving_case
from product_cases import product_code
from segment_case import store
from skinny_linear_case import gated_case, linear_case
from triton import JITFunction
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from ds_offload.kernels import admit, append, coded_attention, select, skinny_linear, slot_attention
from ds_offload.kernels.admit_state import AdmitState, result_for
from ds_offload.kernels.product_code import launch_encode

F32, BF16 = torch.float32, torch.bfloat16
# Bytes of shared memory that a program may have, by compute capability: A100, RTX 30, RTX 40 and L4, H100, RTX 50.
SHARED = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 120: 99 * 1024}
Compiled = list[tuple[str, Any]]


@dataclass(frozen=True)
class NoDriver:
    """What Triton asks of a driver before it launches, for a device of compute capability `capability` / 10."""

    capability: int

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        # Triton keeps what it has compiled by device.
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Compiled]:
    """Lets launches only compile, for a compute capability, and gives the list that they join."""

    def begin(capability: int) -> Compiled:
        compiled: Compiled = []
        driver.set_active(NoDriver(capability))

        def bind(kernel: Any, grid: tuple[int, ...]) -> Callable[..., None]:
            def launch(*args: Any, **options: Any) -> None:
                compiled.append((kernel.fn.__name__, kernel.run(*args, grid=grid, warmup=True, **options)))

            return launch

        monkeypatch.setattr(JITFunction, "__getitem__", bind)
        monkeypatch.setattr("ds_offload.kernels.dependent_launch.has_dependent_launches", lambda device: False)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        return compiled

    return begin


@contextlib.contextmanager
def fitting(compiled: Compiled, capability: int, *names: str) -> Iterator[None]:
    """Requires that the kernels `names` are compiled, and that they fit."""
    begin = len(compiled)
    yield
    new = compiled[begin:]
    assert set(names) <= {name for name, _ in new}
    for name, kernel in new:
        assert kernel.metadata.shared <= SHARED[capability], name


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("capability", [86, 89, 120])
def test_labels_of_a_prompt_fit_a_small_gpu(
    compiling: Callable[[int], Compiled], capability: int, dtype: torch.dtype
) -> None:
    """Float32 keys loaded ahead did not."""
    compiled = compiling(capability)
    code = product_code(2, head_dim=128)
    with fitting(compiled, capability, "encode_kernel"):
        rows = torch.zeros(2, 1024, 2, 128, dtype=dtype)
        labels = torch.zeros(2, 1024, code.layout.row_bytes, dtype=torch.uint8)
        launch_encode(rows[:, :, 0], code, labels, None, None)


@pytest.mark.parametrize("capability", [80, 89, 90])
def test_linear_layers_fit(compiling: Callable[[int], Compiled], capability: int) -> None:
    compiled = compiling(capability)
    for tokens, channels in ((1, 4096), (16, 11008)):
        with fitting(compiled, capability, "linear_tensor_core_kernel"):
            case = linear_case(tokens, (64, 32, 32), channels, BF16, whole=False)
            case["norm"] = torch.ones(channels, dtype=BF16), 1e-5
            launch = skinny_linear.skinny_linear_launch(channels, tokens, BF16)
            out = torch.zeros(tokens, 128, dtype=BF16)
            skinny_linear._launch(case["x"], case["weights"], None, case["norm"], None, out, launch, gated=False)
            case = gated_case(tokens, 64, channels, BF16)
            launch = skinny_linear.skinny_linear_launch(channels, tokens, BF16, gated=True)
            weights = case["gate"], case["up"]
            skinny_linear._launch(case["x"], weights, None, case["norm"], None, out[:, :64], launch, gated=True)


def test_selection_and_admission_fit(compiling: Callable[[int], Compiled]) -> None:
    compiled = compiling(89)
    zero, one = torch.zeros(1, dtype=torch.int64), torch.ones((), dtype=torch.int32)
    for tokens, name in ((16384, "select_row_kernel"), (131072, "threshold_kernel")):
        with fitting(compiled, 89, name):
            scores = torch.zeros(1, 1, tokens, dtype=torch.int16)
            select._launch(scores, 4, zero, zero, 1024, torch.zeros(1, 1, 1024, dtype=torch.int64))
    # All of more than a million tokens, too: one tile of a token's parts would be more than Triton has.
    for kept, context in ((8192, 131072), (1_100_000, 1_100_100)):
        with fitting(compiled, 89, "look_up_kernel", "settle_kernel"):
            chosen = torch.zeros(1, 1, kept, dtype=torch.int64)
            state = AdmitState.empty(1, 1, 4 * kept, context, torch.device("cpu"))
            admit._launch(state, chosen, one, one, 0, result_for(chosen, None), None, True)


@pytest.mark.parametrize(("group", "dim", "bits"), [(1, 128, 16), (4, 256, 16), (1, 128, 4), (4, 256, 8)])
def test_attention_fits(compiling: Callable[[int], Compiled], group: int, dim: int, bits: int) -> None:
    case = make_arriving_case(BF16, bits=bits, group=group, dim=dim, kept=40)
    compiled, out = compiling(89), torch.zeros_like(case.query)
    with fitting(compiled, 89, "combine_kernel"):
        if case.code is None:
            slot_attention._launch(case.query, case.rows, case.slots, SCALING, out, case.fresh())
        else:
            rest = (case.code, case.slots, SCALING, out, case.fresh())
            coded_attention._launch(case.query, case.window, case.rows, *rest)


@pytest.mark.parametrize(("capability", "waits"), [(89, False), (90, True)])
def test_a_kernel_of_a_step_waits_before_it_touches_memory(
    compiling: Callable[[int], Compiled], capability: int, waits: bool
) -> None:
    compiled = compiling(capability)
    case = make_arriving_case(BF16, group=4, dim=64, kept=40)
    slot_attention._launch(case.query, case.rows, case.slots, SCALING, torch.zeros_like(case.query), case.fresh())
    scores = torch.zeros(1, 1, 4096, dtype=torch.int16)
    zero = torch.zeros(1, dtype=torch.int64)
    select._launch(scores, 4, zero, zero, 64, torch.zeros(1, 1, 64, dtype=torch.int64))
    append._launch(store([1], 4, 2, 64, BF16), 1, zero, torch.zeros(1, 2, 2, 64, dtype=BF16))
    assert len(compiled) == 4
    for name, kernel in compiled:
        body = kernel.asm["ptx"].partition(".entry")[2]
        touched = re.search(r"\b(ld\.global|st\.global|atom\.|red\.|cp\.async\.)", body)
        assert touched is not None, name
        wait = body.find("griddepcontrol.wait")
        assert (0 <= wait < touched.start()) if waits else wait < 0, name
