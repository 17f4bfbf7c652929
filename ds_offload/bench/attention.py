"""`ds-offload bench attention`: label scores, selection and sparse attention against dense attention."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ds_offload.bench.limits import measure_limits
from ds_offload.bench.report import BenchRow
from ds_offload.bench.sizes import check_room, kept_tokens
from ds_offload.bench.timing import Stopwatch, Timing
from ds_offload.codebooks import has_parts, random_codes
from ds_offload.config import TokenBudget
from ds_offload.errors import InputError
from ds_offload.kernels.label_codec import LabelLayout
from ds_offload.kernels.product_code import ProductLayout
from ds_offload.kernels.select import select_tokens
from ds_offload.kernels.slot_attention import slot_attention
from ds_offload.label_choice import default_label_channels
from ds_offload.memory.label_cache import LabelCache
from ds_offload.memory.label_code import LabelCode, ProductLabels, ScalarLabels
from ds_offload.notices import notice

# Of the labels that are compared with the default ones.
LABEL_BITS = (2, 4)
# Calls that follow each other read at least so many bytes in all: more than a level 2 cache holds.
ROTATED_BYTES = 256 << 20
MOST_ROW_BYTES = 6 << 30
# Calls of short contexts take the time of a launch, not of their bytes.
MOST_LAYERS = 64
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


@dataclass(frozen=True)
class AttentionSizes:
    """One layer of `heads` query and `kv_heads` KV heads of `head_dim`, in every batch at every context.

    Raises:
        InputError: Heads that do not divide.
    """

    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int
    budget: TokenBudget
    dtype: torch.dtype

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise InputError(f"heads={self.heads} must be a multiple of kv_heads={self.kv_heads}")

    @classmethod
    def default(cls, device: torch.device) -> AttentionSizes:
        """32 heads of 128 channels in bf16 on a GPU, small sizes on a CPU."""
        budget = TokenBudget.parse("1/16")
        if device.type == "cuda":
            return cls((1, 4, 16, 32), (1 << 12, 1 << 14, 1 << 16), 32, 32, 128, budget, torch.bfloat16)
        return cls((1, 2), (1 << 10,), 4, 2, 64, budget, torch.float32)

    @property
    def layouts(self) -> dict[str, LabelLayout | ProductLayout]:
        """Labels that such heads may have, all of about as many bytes, the default ones first."""
        layouts: dict[str, LabelLayout | ProductLayout] = {}
        if has_parts(self.head_dim):
            layouts["product code"] = ProductLayout(self.head_dim)
        for bits in LABEL_BITS:
            layout = LabelLayout(default_label_channels(self.head_dim, bits), bits)
            layouts[f"{layout.channels} x {bits} bit"] = layout
        return layouts

    def label_bytes(self, layout: LabelLayout | ProductLayout, batch: int, tokens: int) -> int:
        """Bytes of the labels of one layer."""
        return batch * self.kv_heads * tokens * layout.row_bytes

    def row_bytes(self, batch: int, tokens: int) -> int:
        """Bytes of every K and V."""
        return batch * self.kv_heads * tokens * 2 * self.head_dim * self.dtype.itemsize

    def read_bytes(self, batch: int, tokens: int) -> int:
        """Bytes that the sparse operator has to read: all labels and the kept rows."""
        labels = self.label_bytes(next(iter(self.layouts.values())), batch, tokens)
        return labels + self.row_bytes(batch, kept_tokens(self.budget, tokens))

    def layers(self, device: torch.device, batch: int, tokens: int) -> int:
        """Layers that are attended in turn, so that the level 2 cache does not hold what the next call reads."""
        if device.type != "cuda":
            return 1
        wanted = -(-ROTATED_BYTES // self.read_bytes(batch, tokens))
        return max(1, min(wanted, MOST_LAYERS, MOST_ROW_BYTES // self.row_bytes(batch, tokens)))


def bench_attention(device: torch.device, sizes: AttentionSizes, samples: int) -> tuple[list[BenchRow], list[str]]:
    """Time the sparse operator with everything on the device, slot attention over all rows, and torch's attention.

    The limit of the sparse operator is the time of reading all labels and the kept rows;
    that of dense attention, of reading all rows. Label scores are timed by themselves, too, for
    the default labels and others: their limit is the time of reading those once.

    Returns:
        The rows, and a line for each of torch's kernels that does not take these inputs.

    Raises:
        InputError: A budget that depends on scores, or rows that do not fit the memory.
    """
    cases = [(batch, tokens) for tokens in sizes.contexts for batch in sizes.batches]
    for batch, tokens in cases:
        layers = sizes.layers(device, batch, tokens)
        labels = layers * sum(sizes.label_bytes(layout, batch, tokens) for layout in sizes.layouts.values())
        scores = batch * tokens * (3 * sizes.heads * 4 + sizes.kv_heads * 8)
        check_room(device, gpu=layers * sizes.row_bytes(batch, tokens) + labels + 2 * scores)
    # Now, while the device is empty.
    measure_limits(device)
    watch = Stopwatch(device, samples)
    rows: list[BenchRow] = []
    notes: dict[str, None] = {}
    for batch, tokens in cases:
        notice(f"bench attention: batch {batch}, {tokens:,} tokens")
        rows += _Case(sizes, batch, tokens, watch).rows(notes)
    return rows, list(notes)


class _Case:
    """One batch at one context: random K and V and the labels of these keys."""

    def __init__(self, sizes: AttentionSizes, batch: int, tokens: int, watch: Stopwatch) -> None:
        self.sizes, self.batch, self.tokens, self.watch = sizes, batch, tokens, watch
        device = watch.device
        self.kept = kept_tokens(sizes.budget, tokens)
        self.scaling = sizes.head_dim**-0.5
        self.layers = range(sizes.layers(device, batch, tokens))
        generator = torch.Generator(device).manual_seed(0)
        shape = (len(self.layers), batch, sizes.kv_heads, tokens, 2, sizes.head_dim)
        self.all_rows = torch.empty(shape, dtype=sizes.dtype, device=device).normal_(generator=generator)
        query = torch.empty(batch, sizes.heads, sizes.head_dim, dtype=sizes.dtype, device=device)
        self.query = query.normal_(generator=generator)
        self.labels = {name: self._encode(layout) for name, layout in sizes.layouts.items()}
        self.lengths = torch.full((batch,), tokens, dtype=torch.int64, device=device)
        self.keep = torch.full((batch,), self.kept, dtype=torch.int64, device=device)

    def _encode(self, layout: LabelLayout | ProductLayout) -> LabelCache:
        sizes, device = self.sizes, self.watch.device
        heads = (len(self.layers), sizes.kv_heads, sizes.head_dim)
        code: LabelCode
        if isinstance(layout, ProductLayout):
            code = ProductLabels(random_codes(*heads), device)
        else:
            channels = torch.arange(sizes.head_dim).expand(heads).contiguous()
            code = ScalarLabels(layout, channels, torch.zeros(heads), device)
        labels = LabelCache(code, [self.tokens] * self.batch, device)
        for layer in self.layers:
            for sequence in range(self.batch):
                labels.write_prompt(layer, sequence, 0, self.all_rows[layer, sequence, :, :, 0])
        return labels

    def rows(self, notes: dict[str, None]) -> list[BenchRow]:
        """The sparse operator, slot attention over all rows, and the fastest of torch's kernels."""
        limits = measure_limits(self.watch.device)
        sparse_bytes = self.sizes.read_bytes(self.batch, self.tokens)
        dense_bytes = self.sizes.row_bytes(self.batch, self.tokens)
        sparse = self.watch.time([partial(self.sparse, layer) for layer in self.layers])
        everything = torch.arange(self.tokens, device=self.watch.device)
        slots = everything.expand(self.batch, self.sizes.kv_heads, -1).contiguous()
        dense = self.watch.time([partial(self.attend, layer, slots) for layer in self.layers])
        del slots
        by_backend = self._time_sdpa(notes)
        figures = {"batch": self.batch, "tokens": self.tokens}
        name = f"batch {self.batch}, {self.tokens:,} tokens"
        ratios = {"byte_ratio": dense_bytes / sparse_bytes, "speedup_vs_dense": dense.median / sparse.median}
        results = []
        if by_backend:
            fastest = min(by_backend, key=lambda backend: by_backend[backend].median)
            ratios["speedup_vs_sdpa"] = by_backend[fastest].median / sparse.median
            timed = {f"{backend}_us": timing.median * 1e6 for backend, timing in by_backend.items()}
            sdpa = figures | {"bytes": dense_bytes, "backend": fastest} | timed
            limit = limits.memory_s(dense_bytes)
            results.append(BenchRow.of(f"{name}, torch SDPA", by_backend[fastest], "us", limit, **sdpa))
        sparse_figures = figures | {"bytes": sparse_bytes, "kept": self.kept} | ratios
        limit = limits.memory_s(sparse_bytes)
        results.insert(0, BenchRow.of(f"{name}, sparse", sparse, "us", limit, **sparse_figures))
        limit = limits.memory_s(dense_bytes)
        results.insert(1, BenchRow.of(f"{name}, slot attention", dense, "us", limit, **figures, bytes=dense_bytes))
        for code, layout in self.sizes.layouts.items():
            timing = self.watch.time([partial(self.scores, layer, self.labels[code]) for layer in self.layers])
            read = self.sizes.label_bytes(layout, self.batch, self.tokens)
            title = f"{name}, label scores, {code}"
            results.append(BenchRow.of(title, timing, "us", limits.memory_s(read), **figures, bytes=read))
        return results

    def scores(self, layer: int, labels: LabelCache) -> Tensor:
        """Scores of a layer's labels of every token, as a selection wants them."""
        return labels.scores(layer, self.query, self.lengths, self.tokens, self.scaling, order=True)

    def sparse(self, layer: int) -> Tensor:
        """What a decode step does for a layer once its K and V are there: scores, selection, attention in place."""
        scores = self.scores(layer, next(iter(self.labels.values())))
        tokens = select_tokens(scores, 0, self.lengths, self.keep, self.kept)
        return self.attend(layer, tokens)

    def attend(self, layer: int, slots: Tensor) -> Tensor:
        """Slot attention over the layer's rows where they stand."""
        return slot_attention(self.query, self.all_rows[layer], slots, self.scaling)

    def _time_sdpa(self, notes: dict[str, None]) -> dict[str, Timing]:
        """Each of torch's kernels; on a CPU the one that torch chooses."""
        if self.watch.device.type != "cuda":
            return {"cpu": self.watch.time(self._sdpa_calls())}
        timings = {}
        for name, backend in BACKENDS.items():
            with sdpa_kernel(backend), warnings.catch_warnings():
                # One a reason for which a kernel is not used; the error says that it is not.
                warnings.simplefilter("ignore")
                try:
                    timings[name] = self.watch.time(self._sdpa_calls())
                except RuntimeError as error:
                    notes[f"torch's {name} kernel was left out: {str(error).splitlines()[0]}"] = None
        return timings

    def _sdpa_calls(self) -> list[Callable[[], Tensor]]:
        """Attention of `[B, H, 1, D]` to K and V `[B, Hkv, T, D]`, each contiguous.

        The rows' own memory, halved: its numbers are random either way.
        """
        sizes = self.sizes
        shape = (2, self.batch, sizes.kv_heads, self.tokens, sizes.head_dim)
        calls: list[Callable[[], Tensor]] = []
        for rows in self.all_rows:
            key, value = rows.view(shape)
            calls.append(
                partial(
                    F.scaled_dot_product_attention,
                    self.query[:, :, None],
                    key,
                    value,
                    scale=self.scaling,
                    enable_gqa=sizes.heads != sizes.kv_heads,
                )
            )
        return calls
