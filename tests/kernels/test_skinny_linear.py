"""Skinny linear layers against matrix products in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from skinny_linear_case import (
    BF16,
    EPS,
    F16,
    F32,
    Case,
    assert_close,
    gated_case,
    linear_case,
    naive,
    naive_gated,
    values,
)

from ds_offload.kernels.skinny_linear import (
    SkinnyLinearLaunch,
    gated_linear,
    gated_linear_reference,
    skinny_linear,
    skinny_linear_launch,
    skinny_linear_reference,
)

DTYPES = [F32, F16, BF16]
LINEAR = [skinny_linear, skinny_linear_reference]
GATED = [gated_linear, gated_linear_reference]


@pytest.mark.parametrize("linear", LINEAR)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(
    ("n", "sizes", "k"), [(1, (33,), 64), (2, (7, 64), 100), (5, (64, 7, 33), 576), (16, (1, 2, 1), 1)]
)
def test_linear(linear: Callable, n: int, sizes: tuple[int, ...], k: int, whole: bool, dtype: torch.dtype) -> None:
    case = linear_case(n, sizes, k, dtype, whole=whole)
    for out_dtype in (dtype, F32):
        out = torch.full((n, sum(sizes)), torch.nan, dtype=out_dtype)
        assert linear(**case, out=out) is out
        assert_close(out, naive(**case), dtype)
    assert torch.equal(linear(**case), out.to(dtype))


@pytest.mark.parametrize("gated", GATED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(("n", "m", "k"), [(1, 33, 64), (2, 64, 100), (5, 7, 576), (16, 1, 1)])
def test_gated(gated: Callable, n: int, m: int, k: int, whole: bool, dtype: torch.dtype) -> None:
    case = gated_case(n, m, k, dtype, whole=whole)
    for out_dtype in (dtype, F32):
        out = torch.full((n, m), torch.nan, dtype=out_dtype)
        assert gated(**case, out=out) is out
        assert_close(out, naive_gated(**case), dtype)
    assert torch.equal(gated(**case), out.to(dtype))


def rows(case: Case, n: slice) -> Case:
    cut = {name: case[name][n] for name in ("x", "residual") if case.get(name) is not None}
    return case | cut


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "k"), [(33, 100), (64, 576), (7, 20), (640, 4096), (50, 11008)])
def test_same_bits_in_every_batch(m: int, k: int, dtype: torch.dtype, device: str) -> None:
    case, gated = linear_case(16, (m, 7, m), k, dtype, device), gated_case(16, m, k, dtype, device)
    together, gated_together = skinny_linear(**case), gated_linear(**gated)
    for n in (*(slice(i, i + 1) for i in range(16)), slice(0, 8), slice(3, 12), slice(1, 16)):
        assert torch.equal(skinny_linear(**rows(case, n)), together[n])
        assert torch.equal(gated_linear(**rows(gated, n)), gated_together[n])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_residual_may_be_the_result(dtype: torch.dtype, device: str) -> None:
    case = linear_case(5, (33, 64), 100, dtype, device)
    expected = skinny_linear(**case)
    assert torch.equal(skinny_linear(**case, out=case["residual"]), expected)


@pytest.mark.parametrize("linear", LINEAR)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(16)}, r"x .* must be float \[N from 1 to 16, K\]"),
        ({"x": torch.zeros(17, 16)}, "x .* must be float"),
        ({"x": torch.zeros(0, 16)}, "x .* must be float"),
        ({"x": torch.zeros(2, 16, dtype=torch.float64)}, "x torch.float64"),
        ({"x": torch.zeros(16, 2).T}, "x .* contiguous"),
        ({"weights": ()}, "0 weights were given"),
        ({"weights": (torch.zeros(4, 16),) * 4}, "4 weights were given"),
        ({"weights": (torch.zeros(4, 16), torch.zeros(4, 8))}, r"weight 1 \(4, 8\) must be \(4, 16\)"),
        ({"weights": (torch.zeros(16), torch.zeros(4, 16))}, "weight 0 .* must be"),
        ({"weights": (torch.zeros(16, 4).T, torch.zeros(4, 16))}, "weight 0 .* contiguous"),
        ({"weights": (torch.zeros(4, 16), torch.zeros(4, 16, dtype=F16))}, "weight 1 is torch.float16; it must be"),
        ({"biases": (None,)}, "1 biases were given for 2 weights"),
        ({"biases": (None, torch.zeros(5))}, r"bias 1 \(5,\) must be \(4,\)"),
        ({"norm": (torch.zeros(4), EPS)}, "norm weight .* must be"),
        ({"norm": (torch.zeros(16, dtype=BF16), EPS)}, "norm weight is torch.bfloat16"),
        ({"residual": torch.zeros(2, 4)}, r"residual \(2, 4\) must be \(2, 8\)"),
        ({"residual": torch.zeros(2, 8, dtype=F16)}, "residual is torch.float16"),
        ({"out": torch.zeros(2, 4)}, r"out \(2, 4\) must be \(2, 8\)"),
        ({"out": torch.zeros(2, 8, dtype=F16)}, "out is torch.float16"),
        ({"out": torch.zeros(8, 2).T}, "out .* contiguous"),
        ({"out": torch.zeros(2, 8, device="meta")}, "out is on meta"),
    ],
)
def test_wrong_arguments_are_named(linear: Callable, change: Case, message: str) -> None:
    arguments = {"x": torch.zeros(2, 16), "weights": (torch.zeros(4, 16), torch.zeros(4, 16))}
    linear(**arguments)
    with pytest.raises(ValueError, match=message):
        linear(**(arguments | change))


@pytest.mark.parametrize("gated", GATED)
def test_wrong_arguments_of_gated_are_named(gated: Callable) -> None:
    x, weight = torch.zeros(2, 16), torch.zeros(4, 16)
    with pytest.raises(ValueError, match=r"up \(5, 16\) must have gate's shape \(4, 16\)"):
        gated(x, weight, torch.zeros(5, 16))
    with pytest.raises(ValueError, match="weight 0"):
        gated(x, torch.zeros(16), torch.zeros(16))
    with pytest.raises(ValueError, match=r"out .* must be"):
        gated(x, weight, weight, out=torch.zeros(2, 8))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 20, 64, 576, 4096, 14336])
def test_launch_keeps_the_order_of_sums(k: int, dtype: torch.dtype, gated: bool) -> None:
    launches = [skinny_linear_launch(k, n, dtype, gated) for n in range(1, 17)]
    assert len({(launch.tensor_cores, launch.block_k, launch.warps) for launch in launches}) == 1
    for n, launch in enumerate(launches, start=1):
        assert launch.tensor_cores == (dtype != F32)
        assert launch.columns >= n or not launch.tensor_cores


@pytest.mark.parametrize(
    "fields", [(True, 8, 8, 64, 4, 3), (True, 4, 16, 64, 4, 3), (True, 8, 16, 32, 4, 3), (True, 8, 16, 64, 4, 1)]
)
def test_launches_that_the_tensor_cores_do_not_take(fields: tuple) -> None:
    with pytest.raises(ValueError, match="needs columns"):
        SkinnyLinearLaunch(*fields)


@pytest.mark.parametrize("fields", [(False, 8, 8, 64, 4, 1), (False, 1, 3, 64, 4, 1), (False, 1, 4, 64, 4, 0)])
def test_launches_that_no_kernel_takes(fields: tuple) -> None:
    with pytest.raises(ValueError, match="must be"):
        SkinnyLinearLaunch(*fields)


def test_triton_kernels_in_the_interpreter(interpret: Callable[[str], None]) -> None:
    interpret("interpreted_skinny_linear.py")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 5, 8, 9, 16])
@pytest.mark.parametrize("k", [20, 64, 100, 576])
def test_cuda_odd_sizes(n: int, k: int, dtype: torch.dtype) -> None:
    for sizes in ((33,), (7, 64), (64, 7, 33)):
        for whole in (False, True):
            case = linear_case(n, sizes, k, dtype, "cuda", whole)
            out = torch.full((n, sum(sizes)), torch.nan, dtype=dtype, device="cuda")
            assert_close(skinny_linear(**case, out=out), naive(**case), dtype)
            gated = gated_case(n, sizes[0], k, dtype, "cuda", whole)
            out = torch.full((n, sizes[0]), torch.nan, dtype=F32, device="cuda")
            assert_close(gated_linear(**gated, out=out), naive_gated(**gated), dtype)


# q, k, v of Llama-2-7B and Llama-3.1-8B; down; a head; the smallest model's q, k, v.
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("sizes", "k"),
    [((4096,) * 3, 4096), ((4096, 1024, 1024), 4096), ((4096,), 14336), ((32000,), 4096), ((576, 192, 192), 576)],
)
def test_cuda_full_size(sizes: tuple[int, ...], k: int, dtype: torch.dtype) -> None:
    for n, whole in ((1, True), (8, False), (16, True)):
        case = linear_case(n, sizes, k, dtype, "cuda", whole)
        out = torch.full((n, sum(sizes)), torch.nan, dtype=F32, device="cuda")
        torch.cuda.set_sync_debug_mode("error")
        try:
            skinny_linear(**case, out=out)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert_close(out, naive(**case), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "k"), [(11008, 4096), (14336, 4096), (1536, 576)])
def test_cuda_gated_full_size(m: int, k: int, dtype: torch.dtype) -> None:
    for n, whole in ((1, True), (8, False), (16, True)):
        case = gated_case(n, m, k, dtype, "cuda", whole)
        out = torch.full((n, m), torch.nan, dtype=dtype, device="cuda")
        assert_close(gated_linear(**case, out=out), naive_gated(**case), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [F16, BF16])
def test_cuda_without_tensor_cores(dtype: torch.dtype) -> None:
    launch = SkinnyLinearLaunch(False, 1, block_m=4, block_k=1024, warps=4, stages=3)
    case, gated = linear_case(3, (640, 64, 33), 4096, dtype, "cuda"), gated_case(3, 640, 4096, dtype, "cuda")
    assert_close(skinny_linear(**case, launch=launch), naive(**case), dtype)
    assert_close(gated_linear(**gated, launch=launch), naive_gated(**gated), dtype)


@pytest.mark.gpu
def test_cuda_refuses_a_launch_that_does_not_fit() -> None:
    launch = SkinnyLinearLaunch(True, 8, 16, 64, 4, 3)
    for n, dtype in ((9, F16), (1, F32)):
        with pytest.raises(ValueError, match="does not fit x"):
            skinny_linear(**linear_case(n, (33,), 64, dtype, "cuda"), launch=launch)


@pytest.mark.gpu
def test_cuda_float16_whose_product_with_the_norm_weight_overflows() -> None:
    x = values(2, 4096, dtype=F16, device="cuda", scale=9000.0)
    weight = values(64, 4096, dtype=F16, device="cuda", scale=4096**-0.5)
    norm = (torch.full((4096,), 60.0, dtype=F16, device="cuda"), EPS)
    expected = naive(x, (weight,), None, norm)
    torch.testing.assert_close(skinny_linear(x, (weight,), norm=norm), expected.half(), rtol=2e-3, atol=0.1)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_weights_that_are_not_aligned(dtype: torch.dtype) -> None:
    case = linear_case(3, (64, 33), 576, dtype, "cuda")
    flat = torch.full((64 * 576 + 1,), torch.nan, dtype=dtype, device="cuda")
    shifted = flat[1:].view(64, 576).copy_(case["weights"][0])
    assert_close(skinny_linear(**(case | {"weights": (shifted, case["weights"][1])})), naive(**case), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_graph_reads_what_it_is_replayed_with(dtype: torch.dtype) -> None:
    case, gated = linear_case(3, (640, 64), 576, dtype, "cuda"), gated_case(3, 640, 576, dtype, "cuda")
    out, gated_out = (torch.empty(3, m, dtype=dtype, device="cuda") for m in (704, 640))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        skinny_linear(**case, out=out)
        gated_linear(**gated, out=gated_out)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        skinny_linear(**case, out=out)
        gated_linear(**gated, out=gated_out)
    for _ in range(2):
        case["x"].normal_()
        case["residual"].normal_()
        gated["x"].normal_()
        out.fill_(torch.nan)
        gated_out.fill_(torch.nan)
        graph.replay()
        assert_close(out, naive(**case), dtype)
        assert_close(gated_out, naive_gated(**gated), dtype)
