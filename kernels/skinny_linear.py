"""Linear layers of up to 16 tokens, with RMSNorm, bias, residual and SwiGLU in the same launch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ds_offload.kernels.skinny_linear_kernels import linear_tensor_core_kernel, linear_vector_kernel
from ds_offload.kernels.triton_runtime import launching, power_of_two

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
MAX_ROWS = 16
MAX_WEIGHTS = 3
# Shared memory for a program's tiles: two programs fit a multiprocessor of sm_90 (227 KiB), one of sm_86 (99 KiB).
TILE_BYTES = 96 * 1024


@dataclass(frozen=True)
class SkinnyLinearLaunch:
    """Launch of the CUDA kernel.

    Attributes:
        tensor_cores: Whether products run on the tensor cores, in the weights' 16-bit dtype.
        columns: Rows of x, padded, that one program computes; 8 or 16, without tensor cores 1.
        block_m: Rows of the weights per program; on the tensor cores at least 16.
        block_k: Channels read at a time; on the tensor cores at least 16 a warp.
        warps: Warps per program; on the tensor cores each takes its own part of `block_k`.
        stages: Of the pipeliner: how far loads run ahead; on the tensor cores at least 2.
    """

    tensor_cores: bool
    columns: int
    block_m: int
    block_k: int
    warps: int
    stages: int

    def __post_init__(self) -> None:
        sizes = self.columns, self.block_m, self.block_k, self.warps
        if self.stages < 1 or any(size < 1 or size & (size - 1) for size in sizes):
            raise ValueError(f"{self}: sizes must be powers of two and stages at least 1")
        if not self.tensor_cores:
            if self.columns != 1:
                raise ValueError(f"{self}: columns must be 1 without tensor cores")
        elif self.columns not in (8, 16) or self.block_m < 16 or self.block_k < 16 * self.warps or self.stages < 2:
            raise ValueError(f"{self}: needs columns 8 or 16, block_m >= 16, block_k >= 16 * warps, stages >= 2")


def skinny_linear_launch(k: int, n: int, dtype: torch.dtype, gated: bool = False) -> SkinnyLinearLaunch:
    """The launch for weights of `k` channels and `n` rows of x.

    What decides the order of a sum, which is the use of tensor cores, `block_k` and
    `warps`, depends on `k` and `dtype` alone: a row of x gives the same bits in every
    batch. Padded columns and the pipeline's depth may differ.

    16-bit weights are multiplied on the tensor cores even for one token, which saves the
    conversion of every weight. With 16 rows a program 4,096 rows make two programs for each
    of 132 multiprocessors; the warps share the channels, since the rows are too few for them.

    float32 is multiplied exactly, one row of x per program: all but the first find the
    weights in L2.
    """
    if dtype == torch.float32:
        block_k = max(32, min(1024, power_of_two(k)))
        return SkinnyLinearLaunch(False, 1, block_m=2 if gated else 4, block_k=block_k, warps=4, stages=1)
    block_m, warps, columns = 16, 4, 8 if n <= 8 else 16
    block_k = max(16 * warps, min(512, power_of_two(k)))
    # Weights and, where x is normalised, two tiles of x.
    tile = block_k * dtype.itemsize * (block_m * (2 if gated else 1) + 2 * columns)
    stages = max(2, min(4, 1 + TILE_BYTES // tile))
    return SkinnyLinearLaunch(True, columns, block_m=block_m, block_k=block_k, warps=warps, stages=stages)


def skinny_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    norm: tuple[Tensor, float] | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    launch: SkinnyLinearLaunch | None = None,
) -> Tensor:
    """`x @ w.T + bias` of up to three weights side by side, plus a residual; x through RMSNorm first if asked.

    Accumulates in float32 and rounds the result once. On CUDA one launch, no host
    synchronisation, each weight read once (float32: once for each row of x, from L2 but
    for the first). x times the norm's weight is rounded to the weights' dtype for the
    tensor cores; the norm's root is applied to the sums (float16: to x). With the default launch a row
    of x gives the same bits alone and in every batch; with launches of the caller's, where
    `tensor_cores`, `block_k` and `warps` are the same. No gradients.

    Args:
        x: [N, K], contiguous; N from 1 to 16; bfloat16, float16 or float32.
        weights: 1 to 3 of [M_i, K] as `nn.Linear` keeps them, contiguous, x's dtype.
        biases: For each weight [M_i] of x's dtype, contiguous, or None.
        norm: RMSNorm of x: the weight [K] of x's dtype, contiguous, and epsilon.
        residual: [N, sum of M_i] of x's dtype, contiguous; added at the end.
        out: [N, sum of M_i], contiguous; x's dtype or float32. It may be `residual` and
            shares no memory with the other arguments.
        launch: CUDA only; `skinny_linear_launch` chooses by default.

    Returns:
        [N, sum of M_i] in x's dtype, or `out`; every element is written.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or a launch does not fit x.
    """
    out = _checked_out(x, weights, biases, norm, residual, out)
    if x.is_cuda:
        launch = launch or skinny_linear_launch(x.shape[1], x.shape[0], x.dtype)
        with launching(x.device, "skinny_linear"):
            _launch(x, weights, biases, norm, residual, out, _checked_launch(x, launch), gated=False)
        return out
    # Another batch is summed in another order: one row at a time gives it the same bits alone.
    wide = [weight.float() for weight in weights]
    for n, row in enumerate(x.split(1)):
        out[n : n + 1] = _linear(row, wide, biases, norm, None if residual is None else residual[n : n + 1])
    return out


def gated_linear(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    norm: tuple[Tensor, float] | None = None,
    out: Tensor | None = None,
    launch: SkinnyLinearLaunch | None = None,
) -> Tensor:
    """SwiGLU, `silu(x @ gate.T) * (x @ up.T)`; x through RMSNorm first if asked.

    As `skinny_linear` in precision, bits and launches; both products stay in float32.

    Args:
        x: As in `skinny_linear`, like `norm` and `launch`.
        gate, up: [M, K] as `nn.Linear` keeps them, contiguous, x's dtype.
        out: [N, M], contiguous; x's dtype or float32; shares no memory with the arguments.

    Returns:
        [N, M] in x's dtype, or `out`; every element is written.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or a launch does not fit x.
    """
    out = _checked_gated_out(x, gate, up, norm, out)
    if x.is_cuda:
        launch = launch or skinny_linear_launch(x.shape[1], x.shape[0], x.dtype, gated=True)
        with launching(x.device, "gated_linear"):
            _launch(x, (gate, up), None, norm, None, out, _checked_launch(x, launch), gated=True)
        return out
    wide = [gate.float(), up.float()]
    for n, row in enumerate(x.split(1)):
        first, second = _linear(row, wide, None, norm, None).chunk(2, -1)
        out[n : n + 1] = functional.silu(first) * second
    return out


def _launch(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None,
    norm: tuple[Tensor, float] | None,
    residual: Tensor | None,
    out: Tensor,
    launch: SkinnyLinearLaunch,
    gated: bool,
) -> None:
    n, k = x.shape
    absent = [None] * MAX_WEIGHTS
    gain, eps = (norm[0], float(norm[1])) if norm is not None else (None, 0.0)
    sizes = [*_sizes(weights[:1] if gated else weights), 0, 0][:MAX_WEIGHTS]
    blocks = sum(-(-size // launch.block_m) for size in sizes)
    extra: dict[str, Any] = {"COLUMNS": launch.columns, "SPLITS": launch.warps} if launch.tensor_cores else {}
    kernel, programs = (
        (linear_tensor_core_kernel, blocks) if launch.tensor_cores else (linear_vector_kernel, blocks * n)
    )
    kernel[(programs,)](
        x,
        *[*weights, *absent][:MAX_WEIGHTS],
        *[*(biases or ()), *absent][:MAX_WEIGHTS],
        gain,
        residual,
        out,
        n,
        eps,
        M0=sizes[0],
        M1=sizes[1],
        M2=sizes[2],
        K=k,
        GATED=gated,
        BLOCK_M=launch.block_m,
        BLOCK_K=launch.block_k,
        STAGES=launch.stages,
        **extra,
        num_warps=launch.warps,
    )


def skinny_linear_reference(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    norm: tuple[Tensor, float] | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`skinny_linear` in torch, float32, written out; it has no launch to choose."""
    out = _checked_out(x, weights, biases, norm, residual, out)
    return out.copy_(_linear(x, weights, biases, norm, residual))


def gated_linear_reference(
    x: Tensor, gate: Tensor, up: Tensor, norm: tuple[Tensor, float] | None = None, out: Tensor | None = None
) -> Tensor:
    """`gated_linear` in torch, float32, written out."""
    out = _checked_gated_out(x, gate, up, norm, out)
    first, second = _linear(x, (gate, up), None, norm, None).chunk(2, -1)
    return out.copy_(functional.silu(first) * second)


def _linear(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None,
    norm: tuple[Tensor, float] | None,
    residual: Tensor | None,
) -> Tensor:
    x = x.float()
    if norm is not None:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm[1]) * norm[0].float()
    out = torch.cat([x @ weight.float().mT for weight in weights], -1)
    if biases is not None:
        parts = zip(out.split(_sizes(weights), -1), biases, strict=True)
        out = torch.cat([part if bias is None else part + bias.float() for part, bias in parts], -1)
    return out if residual is None else out + residual.float()


def _sizes(weights: Sequence[Tensor]) -> list[int]:
    return [weight.shape[0] if weight.dim() else 0 for weight in weights]


def _checked_launch(x: Tensor, launch: SkinnyLinearLaunch) -> SkinnyLinearLaunch:
    if launch.tensor_cores and (x.dtype == torch.float32 or x.shape[0] > launch.columns):
        raise ValueError(f"{launch} does not fit x {x.dtype} {tuple(x.shape)}: 16-bit rows, at most `columns`")
    return launch


def _checked_gated_out(
    x: Tensor, gate: Tensor, up: Tensor, norm: tuple[Tensor, float] | None, out: Tensor | None
) -> Tensor:
    if gate.shape != up.shape:
        raise ValueError(f"up {tuple(up.shape)} must have gate's shape {tuple(gate.shape)}")
    return _checked_out(x, (gate, up), None, norm, None, out, gated=True)


def _checked_out(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None,
    norm: tuple[Tensor, float] | None,
    residual: Tensor | None,
    out: Tensor | None,
    gated: bool = False,
) -> Tensor:
    """The result's tensor, after every argument's shape, dtype and device is checked."""
    if x.dim() != 2 or x.dtype not in FLOATS or not 1 <= x.shape[0] <= MAX_ROWS or x.shape[1] < 1:
        raise ValueError(f"x {x.dtype} {tuple(x.shape)} must be float [N from 1 to {MAX_ROWS}, K]")
    n, k = x.shape
    if not 1 <= len(weights) <= MAX_WEIGHTS:
        raise ValueError(f"{len(weights)} weights were given; 1 to {MAX_WEIGHTS} are needed")
    if biases is not None and len(biases) != len(weights):
        raise ValueError(f"{len(biases)} biases were given for {len(weights)} weights; None stands for no bias")
    total = sum(_sizes(weights[:1] if gated else weights))
    needed: list[tuple[str, Tensor | None, tuple[int, ...]]] = [("x", x, (n, k))]
    for i, weight in enumerate(weights):
        if weight.dim() != 2 or weight.shape[0] < 1:
            raise ValueError(f"weight {i} {tuple(weight.shape)} must be [M >= 1, {k}]")
        needed.append((f"weight {i}", weight, (weight.shape[0], k)))
        needed.append((f"bias {i}", biases[i] if biases is not None else None, (weight.shape[0],)))
    needed.append(("norm weight", norm[0] if norm is not None else None, (k,)))
    needed.append(("residual", residual, (n, total)))
    if out is None:
        out = torch.empty(n, total, dtype=x.dtype, device=x.device)
    needed.append(("out", out, (n, total)))
    for name, value, shape in needed:
        if value is None:
            continue
        if value.shape != shape or not value.is_contiguous():
            raise ValueError(f"{name} {tuple(value.shape)} must be {shape}, contiguous")
        if value.dtype != x.dtype and not (name == "out" and value.dtype == torch.float32):
            either = " or torch.float32" if name == "out" else ""
            raise ValueError(f"{name} is {value.dtype}; it must be {x.dtype}{either}, like x")
        if value.device != x.device:
            raise ValueError(f"{name} is on {value.device}; it must be on {x.device} like x")
    return out
