"""`ds-offload bench prefill`: a prompt read by the model, next to what its arithmetic takes at least."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ds_offload.bench.decode import random_calibration
from ds_offload.bench.report import BenchRow
from ds_offload.bench.timing import Stopwatch, Timing
from ds_offload.calibration_file import has_codes
from ds_offload.config import OffloadConfig
from ds_offload.decoder import DecoderStack
from ds_offload.errors import InputError
from ds_offload.families import check_supported
from ds_offload.kv_context import KVContext
from ds_offload.loading import LoadedModel, find_model, load_weights
from ds_offload.memory.kept_blocks import KeptBlocks
from ds_offload.memory.plan import MemoryPlan
from ds_offload.memory_check import check_memory, settle_config
from ds_offload.notices import notice
from ds_offload.prefill import prefill

# Rates are measured on tokens that are long enough to fill the device, and short enough to take no time.
RATE_TOKENS = {"cuda": 16384, "cpu": 512}
RATE_SAMPLES = 5


@dataclass(frozen=True)
class PrefillSizes:
    """What is read: `tokens` random ids by `model`'s shape with random weights of `dtype`, `repeats` times."""

    model: str
    dtype: str
    tokens: int
    repeats: int
    with_transformers: bool


@dataclass(frozen=True)
class Rates:
    """Measured floating-point operations a second: of linear layers, and of causal attention (half the square)."""

    linear: float
    attention: float


def bench_prefill(
    device: torch.device, sizes: PrefillSizes, config: OffloadConfig
) -> tuple[list[BenchRow], list[str], OffloadConfig]:
    """Time whole prefills, from an empty context to the first new token.

    They are timed with memory that is page-locked already (warm), with none of it (cold), and
    with nothing leaving for the store; what the second and third cost over the others is a figure of the rows.
    The limit is the time of the model's operations at the rates of torch's own matrix
    product and fastest attention, both measured now for this shape.

    Returns:
        The rows, notes, and the config with all filled in.

    Raises:
        InputError: The model is not supported, a value is out of range, or it does not fit.
    """
    source = find_model(sizes.model, load_format="dummy", dtype=sizes.dtype)
    check_supported(source.config, 1)
    config = dataclasses.replace(config, max_context=sizes.tokens + 1).resolve(
        head_dim=source.shape.head_dim,
        layers=source.shape.layers,
        trained_context=source.shape.trained_context,
        codes=has_codes(config.calibration),
    )
    lengths = [sizes.tokens], [sizes.tokens + 1]
    config = settle_config(source, config, device, *lengths)
    plan = check_memory(source, config, device, *lengths)
    notice(f"bench prefill: random weights of {sizes.model}'s shape")
    loaded = load_weights(source, device)
    limit = least_seconds(loaded, sizes.tokens, measure_rates(loaded))
    bench = _Prefills(loaded, config, sizes, limit, plan)
    kept, notes = KeptBlocks(), []
    try:
        notice("bench prefill: warm-up")
        bench.seconds(kept)
        alone = bench.row("prefill, nothing leaves for the store", kept, leave=False)
        warm = bench.row("prefill, warm", kept)
    finally:
        kept.close()
    warm.extra["over_nothing_leaving"] = warm.median / alone.median
    rows = [warm, alone]
    if device.type == "cuda":
        cold = bench.row("prefill, cold", None)
        cold.extra["over_warm"] = cold.median / warm.median
        rows.insert(1, cold)
    else:
        notes.append("a cold prefill was left out: without a GPU no memory is page-locked")
    if sizes.with_transformers:
        theirs = _transformers(loaded, sizes, limit)
        if isinstance(theirs, str):
            notes.append(theirs)
        else:
            rows.append(theirs)
    return rows, notes, config


def least_seconds(loaded: LoadedModel, tokens: int, rates: Rates) -> float:
    """Seconds that a prompt's operations take at `rates`: two a weight and token, four a channel and pair of tokens.

    Embeddings are looked up, the last layer's logits are those of one token, and of a
    mixture's experts a token goes through some.
    """
    shape, config = loaded.source.shape, loaded.model.config
    weights = 0.0
    for name, weight in loaded.model.named_parameters():
        if weight.ndim < 2 or "embed_tokens" in name or "lm_head" in name:
            continue
        share = config.num_experts_per_tok / config.num_local_experts if ".experts." in name else 1.0
        weights += share * weight.numel()
    attention = 4 * shape.layers * shape.heads * shape.head_dim * tokens * (tokens + 1) / 2
    return 2 * weights * tokens / rates.linear + attention / rates.attention


@torch.no_grad()
def measure_rates(loaded: LoadedModel) -> Rates:
    """What torch reaches for this shape: its widest linear layer, and the fastest of its attention kernels."""
    shape, device, dtype = loaded.source.shape, loaded.device, loaded.source.dtype
    tokens = RATE_TOKENS[device.type]
    watch = Stopwatch(device, RATE_SAMPLES)
    hidden = torch.randn(tokens, shape.hidden_size, device=device).to(dtype)
    weight = torch.randn(shape.intermediate_size, shape.hidden_size, device=device).to(dtype)
    linear = 2 * hidden.numel() * shape.intermediate_size / watch.time([lambda: F.linear(hidden, weight)]).median
    query, key, value = (torch.randn(1, shape.heads, tokens, shape.head_dim, device=device).to(dtype) for _ in range(3))
    backends = [SDPBackend.FLASH_ATTENTION]
    if device.type == "cuda":
        backends += [SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    seconds = []
    for backend in backends:
        try:
            with sdpa_kernel(backend):
                attend: Callable[[], object] = lambda: F.scaled_dot_product_attention(  # noqa: E731
                    query, key, value, is_causal=True
                )
                seconds.append(watch.time([attend]).median)
        except RuntimeError:
            # It does not take these inputs.
            continue
    if not seconds:
        raise InputError(f"torch has no attention kernel for {dtype} and head dim {shape.head_dim} on {device}")
    pairs = shape.heads * tokens * (tokens + 1) / 2
    return Rates(linear, 4 * pairs * shape.head_dim / min(seconds))


class _Prefills:
    """The same prompt, read into fresh contexts again and again."""

    def __init__(
        self, loaded: LoadedModel, config: OffloadConfig, sizes: PrefillSizes, limit: float, plan: MemoryPlan
    ) -> None:
        self._loaded, self._config, self._sizes, self._limit, self._plan = loaded, config, sizes, limit, plan
        self._decoder = DecoderStack(loaded.model)
        self._calibration = random_calibration(loaded)
        vocabulary, generator = loaded.source.shape.vocab_size, torch.Generator().manual_seed(0)
        self._ids = torch.randint(vocabulary, (sizes.tokens,), generator=generator).tolist()
        self._pinned = 0
        self._stored: list[float] = []

    def row(self, name: str, kept: KeptBlocks | None, leave: bool = True) -> BenchRow:
        """Time prefills whose page-locked memory comes from `kept`, and goes there."""
        cuda = self._loaded.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(self._loaded.device)
        samples = []
        self._stored.clear()
        for repeat in range(self._sizes.repeats):
            notice(f"bench prefill: {name}, {repeat + 1} of {self._sizes.repeats}")
            samples.append(self.seconds(kept, leave))
        timing = Timing.of(samples)
        return BenchRow.of(
            name,
            timing,
            "s",
            self._limit,
            tokens_per_s=self._sizes.tokens / timing.median,
            stored_s=Timing.of(self._stored).median,
            gpu_peak_bytes=torch.cuda.max_memory_allocated(self._loaded.device) if cuda else 0,
            gpu_planned_bytes=self._plan.prefill_tensors if cuda else 0,
            host_pinned_bytes=self._pinned,
            host_planned_bytes=self._plan.host_kv if cuda else 0,
        )

    @torch.no_grad()
    def seconds(self, kept: KeptBlocks | None, leave: bool = True) -> float:
        """One prefill up to its first token, the making of its context and all that it locks counted, but not its end.

        The last layers' rows may be on their way then; when all is stored is noted, too.
        """
        device, tokens = self._loaded.device, self._sizes.tokens
        started = _now(device)
        with KVContext(self._decoder, self._config, self._calibration, [tokens + 1], kept=kept) as context:
            if not leave:
                context.write_prompt = lambda *_, **__: None  # type: ignore[method-assign]
            context.prepare(0, tokens + 1)
            streamed = self._plan.prefill_mode == "streamed"
            logits = prefill(self._decoder, context, 0, self._ids, streamed=streamed)
            context.reserve(0, tokens + 1)
            logits.argmax().item()
            seconds = time.perf_counter() - started
            self._stored.append(_now(device) - started)
            self._pinned = context.pinned_bytes
        return seconds


@torch.no_grad()
def _transformers(loaded: LoadedModel, sizes: PrefillSizes, limit: float) -> BenchRow | str:
    """transformers' own prefill of the same prompt, its cache on the device."""
    ids = torch.zeros(1, sizes.tokens, dtype=torch.int64, device=loaded.device)
    samples = []
    try:
        for _ in range(1 + sizes.repeats):
            started = _now(loaded.device)
            loaded.model(input_ids=ids, use_cache=True, logits_to_keep=1)
            samples.append(_now(loaded.device) - started)
    except torch.OutOfMemoryError:
        return "transformers' own prefill was left out: it does not fit the device's memory"
    timing = Timing.of(samples[1:])
    return BenchRow.of("transformers", timing, "s", limit, tokens_per_s=sizes.tokens / timing.median)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
