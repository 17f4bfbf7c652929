"""GPUs that need not be there: their vendors' published figures, for plans."""

from __future__ import annotations

from dataclasses import dataclass

# GB/s of one lane in one direction after line coding, by PCIe generation.
_LANE_GB_PER_S = {3: 0.985, 4: 1.969, 5: 3.938}
# Of these, what copies of pinned memory reach: an H100 copied 53.8 of 63.0 GB/s (docs/benchmarks.md).
_LINK_SHARE = 0.85


@dataclass(frozen=True)
class PublishedGpu:
    """A GPU by its data sheet. None of it was measured here.

    Attributes:
        memory_bytes: The advertised memory, in decimal GB: a little less than drivers show.
        memory_gb_per_s: Peak bandwidth of the device memory; runs reach some less.
        pcie_generation, pcie_width: The link that it is capable of; some machines give it fewer lanes.
        bf16_tflops: Dense bf16 tensor operations with fp32 accumulation, without sparsity.
    """

    name: str
    memory_bytes: int
    memory_gb_per_s: float
    pcie_generation: int
    pcie_width: int
    bf16_tflops: float

    @property
    def link_gb_per_s(self) -> float:
        """A realistic rate of copies in one direction: 85 % of the link's raw rate."""
        return round(_LINK_SHARE * _LANE_GB_PER_S[self.pcie_generation] * self.pcie_width, 1)


PUBLISHED: dict[str, PublishedGpu] = {
    "h200": PublishedGpu("NVIDIA H200 SXM 141GB", 141 * 10**9, 4800, 5, 16, 989),
    "h100": PublishedGpu("NVIDIA H100 SXM 80GB", 80 * 10**9, 3350, 5, 16, 989),
    "a100": PublishedGpu("NVIDIA A100 SXM 80GB", 80 * 10**9, 2039, 4, 16, 312),
    "l40s": PublishedGpu("NVIDIA L40S", 48 * 10**9, 864, 4, 16, 362),
    "rtx5090": PublishedGpu("NVIDIA GeForce RTX 5090", 32 * 10**9, 1792, 5, 16, 209),
    "rtx4090": PublishedGpu("NVIDIA GeForce RTX 4090", 24 * 10**9, 1008, 4, 16, 165),
    "rtx3090": PublishedGpu("NVIDIA GeForce RTX 3090", 24 * 10**9, 936, 4, 16, 71),
    "l4": PublishedGpu("NVIDIA L4", 24 * 10**9, 300, 4, 16, 121),
    "a10g": PublishedGpu("NVIDIA A10G", 24 * 10**9, 600, 4, 16, 70),
}
