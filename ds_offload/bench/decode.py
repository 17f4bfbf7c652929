"""`ds-offload bench decode`: whole decode steps of a long context, without a prompt."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from ds_offload.bench.decode_steps import StepTimes, time_steps
from ds_offload.bench.decode_variants import Variant, apply_variant, choose_variants
from ds_offload.bench.filled_context import FilledRows, filled_context
from ds_offload.bench.limits import measure_limits
from ds_offload.bench.read_context import read_context, read_windows
from ds_offload.bench.report import BenchRow
from ds_offload.bench.selections import ReplayedSelections
from ds_offload.bench.sizes import check_room
from ds_offload.bench.timing import Timing
from ds_offload.bench.transformers_cache import transformers_row
from ds_offload.calibration import Calibration, find_or_make_calibration
from ds_offload.calibration_file import has_codes
from ds_offload.codebooks import has_parts, random_codes
from ds_offload.config import OffloadConfig
from ds_offload.decoder import DecoderStack
from ds_offload.dtypes import RowFormat
from ds_offload.errors import InputError
from ds_offload.families import check_supported
from ds_offload.kv_context import KVContext
from ds_offload.loading import LoadedModel, ModelSource, find_model, load_tokenizer, load_weights
from ds_offload.memory_check import plan_request, settle_config
from ds_offload.notices import notice

SELECTIONS = ("replayed", "random")
FEWEST_WARM_UPS = 3


@dataclass(frozen=True)
class DecodeSizes:
    """What is decoded.

    Attributes:
        model: An alias, a folder or a .gguf file; its weights are made up, but with `text`.
        dtype: Of the weights.
        tokens: Tokens of each context before the first step.
        sequences: B.
        steps, warm_ups: Steps that are timed, and steps before them.
        selections: "replayed" (as much repetition as in real text) or "random" (what random labels give).
        variants: Names with commas between them; None is all of them.
        with_transformers: Whether transformers' offloaded cache is timed too.
        text: A file that the model, with its own weights, reads before it decodes; None makes everything up.

    Raises:
        InputError: A value out of range.
    """

    model: str
    dtype: str
    tokens: int
    sequences: int
    steps: int
    warm_ups: int
    selections: str
    variants: str | None
    with_transformers: bool
    text: str | None = None

    def __post_init__(self) -> None:
        if self.selections not in SELECTIONS:
            raise InputError(f"selections={self.selections!r} must be one of {', '.join(SELECTIONS)}")
        if self.warm_ups < FEWEST_WARM_UPS:
            raise InputError(
                f"warm_ups={self.warm_ups} is too few to compile and capture; give {FEWEST_WARM_UPS} or more"
            )

    @property
    def prompt(self) -> int:
        """Tokens of a prompt that is really read."""
        return 1 if self.text is None else self.tokens

    @property
    def capacity(self) -> int:
        """Most tokens of each sequence."""
        return self.tokens + self.warm_ups + self.steps


def bench_decode(
    device: torch.device, sizes: DecodeSizes, config: OffloadConfig
) -> tuple[list[BenchRow], list[str], OffloadConfig]:
    """Time decode steps in every variant, each over the same made-up rows.

    A row's limit is the longer of two times: its moved rows' bytes over the link, and weights (without embeddings and
    experts), labels and attended rows from device memory.

    Returns:
        The rows, a line for everything left out, and the config with all filled in.

    Raises:
        InputError: The model is not supported, a value is out of range, or it does not fit.
    """
    if sizes.text is None and sizes.selections == "replayed" and config.budget.top_p is not None:
        raise InputError(f"token_budget={config.budget} depends on the scores; use --selections random with it")
    variants = choose_variants(sizes.variants, config, device.type == "cuda")
    source = find_model(sizes.model, load_format="dummy" if sizes.text is None else "auto", dtype=sizes.dtype)
    check_supported(source.config, 1)
    # No monitor runs between these steps: no memory is planned for it.
    config = dataclasses.replace(config, max_context=sizes.capacity, monitor="off").resolve(
        head_dim=source.shape.head_dim,
        layers=source.shape.layers,
        trained_context=source.shape.trained_context,
        codes=has_codes(config.calibration),
    )
    tokenizer, windows = None, None
    if sizes.text is not None:
        tokenizer = load_tokenizer(source)
        windows = read_windows(sizes.text, tokenizer, sizes.tokens, sizes.sequences)
    lengths = [sizes.prompt] * sizes.sequences, [sizes.capacity] * sizes.sequences
    config = settle_config(source, config, device, *lengths)
    check_fits(source, config, sizes, device, variants)
    # Now, while the device is empty.
    measure_limits(device)
    notice(f"bench decode: {'random' if windows is None else 'the'} weights of {sizes.model}")
    loaded = load_weights(source, device, tokenizer)
    bench = _Bench(loaded, sizes, config, windows)
    rows = [bench.floor(), *bench.run(variants)]
    notes = []
    if sizes.with_transformers:
        notice("bench decode: transformers' offloaded cache")
        theirs = transformers_row(loaded, sizes.sequences, sizes.tokens)
        if isinstance(theirs, str):
            notes.append(theirs)
        else:
            rows.insert(1, theirs)
    return rows, notes, config


def check_fits(
    source: ModelSource, config: OffloadConfig, sizes: DecodeSizes, device: torch.device, variants: list[Variant]
) -> None:
    """Refuse what does not fit, before weights load.

    Raises:
        MemoryPlanError: Weights, caches and replayed selections need more than there is.
    """
    plan = plan_request(source, config, [sizes.prompt] * sizes.sequences, [sizes.capacity] * sizes.sequences)
    gpu = plan.gpu_tensors
    if sizes.text is None and sizes.selections == "replayed":
        heads = (sizes.sequences, source.shape.kv_heads)
        kept = config.budget.tokens(sizes.capacity)
        # The paper's variant holds them a second time, in another order.
        copies = 1 if all(variant.ordered for variant in variants) else 2
        gpu += copies * ReplayedSelections.nbytes(sizes.steps + sizes.warm_ups, heads, kept)
    limits = (config.gpu_memory, config.host_memory)
    gpu_limit, host_limit = (limit if isinstance(limit, int) else None for limit in limits)
    check_room(device, gpu=gpu, host=plan.host_kv, gpu_limit=gpu_limit, host_limit=host_limit)


def random_calibration(loaded: LoadedModel) -> Calibration:
    """A calibration of nothing, for weights that mean nothing."""
    shape = loaded.source.shape
    heads = (shape.layers, shape.kv_heads, shape.head_dim)
    ranks = torch.rand(heads, generator=torch.Generator().manual_seed(0))
    nothing: dict[str, Any] = {"fingerprint": loaded.fingerprint, "tokens": 0, "text": "no text"}
    codes = random_codes(*heads) if has_parts(shape.head_dim) else None
    return Calibration.rank(ranks, torch.zeros(heads), None, codes, **nothing)


class _Bench:
    """One model, its rows and its selections, for all variants."""

    def __init__(
        self, loaded: LoadedModel, sizes: DecodeSizes, config: OffloadConfig, windows: list[list[int]] | None
    ) -> None:
        self.loaded, self.sizes, self.config, self.windows = loaded, sizes, config, windows
        self.device = loaded.device
        self.limits = measure_limits(self.device)
        decoder = DecoderStack(loaded.model)
        if windows is not None:
            self.calibration = find_or_make_calibration(loaded, decoder, config.calibration, windows[0])
        elif config.calibration is not None:
            self.calibration = find_or_make_calibration(loaded, decoder, config.calibration)
        else:
            self.calibration = random_calibration(loaded)

    @property
    def cache_bytes(self) -> int:
        """Bytes of every K and V of the contexts before any is quantised, those of dense layers not counted."""
        shape, config = self.loaded.source.shape, self.config
        layers = shape.layers - len(config.dense_layers)
        dtype = RowFormat.of(config.kv_dtype, self.loaded.source.dtype, shape.head_dim).dtype
        row = 2 * shape.head_dim * dtype.itemsize
        return layers * self.sizes.sequences * shape.kv_heads * self.sizes.tokens * row

    def floor(self) -> BenchRow:
        """What a step takes at least that copies every row: computed, not timed."""
        seconds = self.limits.link_s(self.cache_bytes)
        timing = Timing(seconds, seconds, seconds)
        return BenchRow.of(
            "floor: every row over the link", timing, "ms", seconds, computed=True, bytes=self.cache_bytes
        )

    def run(self, variants: list[Variant]) -> list[BenchRow]:
        """A row of each variant."""
        rows = []
        selections: ReplayedSelections | None = None
        sizes = self.sizes
        with self._filled() as filled:
            for number, variant in enumerate(variants):
                notice(f"bench decode: {variant.name} ({number + 1} of {len(variants)})")
                # Its own, since a variant may change it.
                decoder = DecoderStack(self.loaded.model)
                config = dataclasses.replace(self.config, **variant.changes)
                with self._context(decoder, config, filled) as (context, tokens):
                    if selections is None and self.windows is None and sizes.selections == "replayed":
                        selections = self._draw(decoder, context)
                    apply_variant(variant, decoder, context, selections, first_position=sizes.tokens)
                    lengths = [sizes.tokens] * sizes.sequences
                    times = time_steps(decoder, context, lengths, sizes.warm_ups, sizes.steps, tokens)
                    rows.append(self._row(variant, decoder, context, times))
                del context
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
        return rows

    def _filled(self) -> AbstractContextManager[FilledRows | None]:
        """Made-up rows for all variants; none where a text is read."""
        if self.windows is not None:
            return nullcontext()
        rows = FilledRows(DecoderStack(self.loaded.model), self.config, self.sizes.sequences, self.sizes.capacity)
        notice(f"bench decode: making {rows.nbytes / 2**30:.1f} GiB of rows")
        return rows

    @contextmanager
    def _context(
        self, decoder: DecoderStack, config: OffloadConfig, filled: FilledRows | None
    ) -> Iterator[tuple[KVContext, list[int]]]:
        """A context at the first step, and the newest token of each sequence."""
        sizes = self.sizes
        if filled is None:
            assert self.windows is not None, "a text is read where no rows are made up"
            with read_context(decoder, config, self.calibration, self.windows, sizes.capacity) as read:
                yield read
            return
        with filled_context(
            *(decoder, config, self.calibration, filled),
            sequences=sizes.sequences,
            tokens=sizes.tokens,
            capacity=sizes.capacity,
        ) as context:
            yield context, [0] * sizes.sequences

    def _draw(self, decoder: DecoderStack, context: KVContext) -> ReplayedSelections | None:
        if context.most_kept == 0 or self.config.budget.fraction == 1:
            # Nothing is selected, or everything.
            return None
        sizes, window = self.sizes, context.window
        candidates = (window.sinks, sizes.tokens + 1 - window.ring)
        # A budget of nearly everything keeps more than the first step has.
        kept = min(context.most_kept, candidates[1] - candidates[0])
        shape = (sizes.sequences, decoder.kv_heads)
        return ReplayedSelections.draw(sizes.steps + sizes.warm_ups, shape, kept, candidates, self.device)

    def _row(self, variant: Variant, decoder: DecoderStack, context: KVContext, times: StepTimes) -> BenchRow:
        sizes = self.sizes
        over_link = self.config.kv_location == "host" and variant.moves_rows
        moved = times.traffic.moved * context.store.row_bytes / sizes.steps if over_link else 0.0
        attended = context.kept_tokens(sizes.capacity) * sizes.sequences * decoder.kv_heads * context.store.row_bytes
        attended *= decoder.layers - len(self.config.dense_layers)
        link = self.limits.link_s(moved)
        memory = self.limits.memory_s(self._weight_bytes() + context.labels.nbytes + attended)
        return BenchRow.of(
            variant.name,
            times.timing,
            "ms",
            max(link, memory),
            tokens_per_s=sizes.sequences / times.timing.median,
            speedup_vs_floor=self.limits.link_s(self.cache_bytes) / times.timing.median,
            hit_rate=times.traffic.hit_rate if self.config.kv_location == "host" else None,
            prefetch_recall=times.traffic.recall,
            h2d_bytes_per_token=round(moved / sizes.sequences),
            h2d_gb_per_s=moved / times.timing.median / 1e9,
            link_ms=1000 * link,
            memory_ms=1000 * memory,
            link_busy_ms=None if times.link_busy_s is None else 1000 * times.link_busy_s,
            stall_ms=None if times.stall_s is None else 1000 * times.stall_s,
            cpu_use=times.cpu_use,
        )

    def _weight_bytes(self) -> int:
        model = self.loaded.model
        parameters = {name: weight.nbytes for name, weight in model.named_parameters() if ".experts." not in name}
        if not model.config.tie_word_embeddings:
            parameters = {name: nbytes for name, nbytes in parameters.items() if "embed_tokens" not in name}
        return sum(parameters.values())
