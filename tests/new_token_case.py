"""Cases for the tests of `new_token`: the same tensors each time they are made."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ds_offload.kernels.label_codec import LabelLayout, decode_labels
from ds_offload.kernels.new_token import HeadNorms, LabelRows, WindowRows

POSITIONS = (0, 3, 11)
SINKS, RING = 2, 4


@dataclass
class Case:
    """Arguments of `new_token`; what it writes is poisoned."""

    projected: torch.Tensor
    rope: tuple[torch.Tensor, torch.Tensor]
    positions: torch.Tensor
    kv_rows: torch.Tensor
    norms: HeadNorms | None
    window: WindowRows | None
    labels: LabelRows | None

    @property
    def arguments(self) -> tuple:
        return self.projected, self.rope, self.positions, self.kv_rows


def make_case(
    kv_heads: int,
    group: int,
    dim: int,
    bits: int | None,
    normed: bool,
    windowed: bool,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    rows_dtype: torch.dtype | None = None,
) -> Case:
    generator = torch.Generator().manual_seed(dim + group)
    batch = len(POSITIONS)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).to(device)

    rows_dtype = rows_dtype or dtype
    projected = random(batch, (group + 2) * kv_heads * dim)
    angle = torch.rand(batch, dim // 2, generator=generator).mul(6).repeat(1, 2)
    rope = angle.cos().to(dtype).to(device), angle.sin().to(dtype).to(device)
    norms = HeadNorms(random(dim), random(dim), 1e-6) if normed else None
    window = None
    if windowed:
        poison = torch.full((batch, kv_heads, 9, 2, dim), torch.nan, dtype=rows_dtype, device=device)
        window = WindowRows(poison, SINKS, RING)
    labels = None
    if bits is not None:
        layout = LabelLayout(max(1, dim // 2 - 1), bits)
        channels = torch.stack([torch.randperm(dim, generator=generator) for _ in range(kv_heads)])
        capacity = max(POSITIONS) + 1
        labels = LabelRows(
            torch.zeros(kv_heads, batch * capacity, layout.row_bytes, dtype=torch.uint8, device=device),
            layout,
            channels[:, : layout.channels].contiguous().to(device),
            torch.randn(kv_heads, layout.channels, generator=generator).to(device),
            (torch.arange(batch) * capacity).to(device),
        )
    kv_rows = torch.full((batch, kv_heads, 2, dim), torch.nan, dtype=rows_dtype, device=device)
    return Case(projected, rope, torch.tensor(POSITIONS, device=device), kv_rows, norms, window, labels)


def assert_close_labels(ours: LabelRows, theirs: LabelRows) -> None:
    """Rounding to a code or a scale may fall to the other side; what is decoded must stay close."""
    decoded = [decode_labels(labels.rows.cpu(), labels.layout) for labels in (ours, theirs)]
    largest = decoded[1].abs().amax(-1, keepdim=True).clamp(min=1e-30)
    steps = 1 if ours.layout.bits == 16 else ours.layout.largest
    assert ((decoded[0] - decoded[1]).abs() <= largest * (2.2 / steps if steps > 1 else 1e-3)).all()
    if ours.layout.bits < 16:
        same = (ours.rows.cpu() == theirs.rows.cpu()).float().mean()
        assert same > 0.97, same
