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
    """Time whole prefills.

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
    rows = [
        _row("prefill", loaded, config, sizes, limit, plan, leave=True),
        _row("prefill, nothing leaves for the store", loaded, config, sizes, limit, plan, leave=False),
    ]
    notes = []
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


@torch.no_grad()
def _row(
    name: str,
    loaded: LoadedModel,
    config: OffloadConfig,
    sizes: PrefillSizes,
    limit: float,
    plan: MemoryPlan,
    leave: bool,
) -> BenchRow:
    """Time prefills into fresh contexts; the first one warms up and is not counted."""
    decoder = DecoderStack(loaded.model)
    ids = torch.randint(loaded.source.shape.vocab_size, (sizes.tokens,), generator=torch.Generator().manual_seed(0))
    cuda = loaded.device.type == "cuda"
    samples: list[float] = []
    for repeat in range(1 + sizes.repeats):
        notice(f"bench prefill: {name}, {'warm-up' if repeat == 0 else f'{repeat} of {sizes.repeats}'}")
        with KVContext(decoder, config, random_calibration(loaded), [sizes.tokens + 1]) as context:
            if not leave:
                context.write_prompt = lambda *_, **__: None  # type: ignore[method-assign]
            if cuda:
                torch.cuda.reset_peak_memory_stats(loaded.device)
            started = _now(loaded.device)
            prefill(decoder, context, 0, ids.tolist(), streamed=plan.prefill_mode == "streamed")
            samples.append(_now(loaded.device) - started)
    peak = torch.cuda.max_memory_allocated(loaded.device) if cuda else 0
    timing = Timing.of(samples[1:])
    return BenchRow.of(
        name,
        timing,
        "s",
        limit,
        tokens_per_s=sizes.tokens / timing.median,
        first_s=samples[0],
        gpu_peak_bytes=peak,
        gpu_planned_bytes=plan.gpu_tensors if cuda else 0,
    )


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
