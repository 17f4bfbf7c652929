"""Rows and codes for the tests of K/V at 8 and 4 bits, and a float64 reference of the codec."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_offload.kernels.kv_codec import RowCode, RowLayout


def make_code(bits: int, dim: int, *lead: int, device: str = "cpu", seed: int = 0) -> RowCode:
    """A code whose factors `[*lead, D]` vary from channel to channel."""
    generator = torch.Generator().manual_seed(seed)
    factor = torch.exp2(torch.randint(-3, 3, (*lead, dim), generator=generator).float())
    return RowCode(RowLayout(bits, dim), factor.to(device))


def make_rows(code: RowCode, shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """Rows `[*shape, 2, D]` whose keys spread as the code's factors, around 3."""
    generator = torch.Generator().manual_seed(sum(shape))
    rows = torch.randn(*shape, 2, code.layout.head_dim, generator=generator)
    rows[..., 0, :] = (rows[..., 0, :] + 3) * code.factor.cpu()
    return rows.to(device, dtype)


def round_trip64(rows: Tensor, code: RowCode) -> tuple[Tensor, Tensor]:
    """What rows become, in float64 with centre and step as float16, and a bound of the error: `[..., 2, D]` each."""
    top = 2**code.layout.bits - 1
    wide = rows.double()
    factor = code.factor.double()
    wide = torch.stack((wide[..., 0, :] / factor, wide[..., 1, :]), -2)
    halves = wide.unflatten(-1, (2, -1))
    low, high = halves.amin(-1, keepdim=True), halves.amax(-1, keepdim=True)
    centre = ((low + high) / 2).half().double()
    step = (torch.maximum(high - centre, centre - low) * 2 / top).half().double()
    codes = torch.floor(torch.where(step > 0, (halves - centre) / step, 0) + (top + 1) / 2).clamp(0, top)
    back = (codes - top / 2) * step + centre
    # The step's own rounding leaves the outermost values a little outside.
    bound = (step * (0.5 + top * 2.0**-11)).expand_as(halves)
    back, bound = back.flatten(-2), bound.flatten(-2)
    back = torch.stack((back[..., 0, :] * factor, back[..., 1, :]), -2)
    return back, torch.stack((bound[..., 0, :] * factor, bound[..., 1, :]), -2)
