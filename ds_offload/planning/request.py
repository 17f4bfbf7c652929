"""A request as far as it decides memory, and the memory that there is."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ds_offload.config import OffloadConfig
from ds_offload.dtypes import RowFormat
from ds_offload.kernels.skinny_linear import FLOATS
from ds_offload.label_setting import label_layout
from ds_offload.loading import ModelSource
from ds_offload.memory.plan import CacheShape, MemoryPlan, hot_set_capacity, plan_memory
from ds_offload.memory.window import AttentionWindow
from ds_offload.prefetch.selection import LOOK_AHEAD_PART


@dataclass(frozen=True)
class Shortage:
    """What does not fit: bytes needed of "GPU memory", "host memory" or "disk", and bytes there."""

    place: str
    needed: int
    limit: int

    def last_resort(self, config: OffloadConfig) -> str:
        """What to do where no flag of `find_changes` makes it fit."""
        if self.place == "disk":
            return "give kv_dir a folder on a disk with more room, or choose a smaller model"
        field = "gpu_memory" if self.place == "GPU memory" else "host_memory"
        if getattr(config, field) != self.limit:
            return "choose a smaller model"
        return f"raise {field}, or choose a smaller model"


@dataclass(frozen=True)
class MemoryLimits:
    """Bytes that may be taken; of the GPU None where the CPU computes, of a disk where K/V are not in files."""

    gpu: int | None
    host: int
    disk: int | None = None

    def shortage(self, plan: MemoryPlan) -> Shortage | None:
        """What of a plan does not fit, the GPU first, then the host; None where all does.

        On a CPU everything counts as host memory.
        """
        if self.gpu is not None and plan.gpu_total > self.gpu:
            return Shortage("GPU memory", plan.gpu_total, self.gpu)
        host = host_total(plan, self.gpu is not None)
        if host > self.host:
            return Shortage("host memory", host, self.host)
        if self.disk is not None and plan.disk_kv > self.disk:
            return Shortage("disk", plan.disk_kv, self.disk)
        return None


def memory_text(count: int) -> str:
    """Bytes for people: "1.50 GiB", below that "512.00 MiB"."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"


def host_total(plan: MemoryPlan, cuda: bool) -> int:
    """Peak bytes on the host: the store and what a prefill keeps there, and on a CPU everything else, too."""
    return plan.host_kv + plan.host_states + (0 if cuda else plan.gpu_total)


@dataclass(frozen=True)
class Request:
    """Sequences to be prefilled and decoded together.

    Attributes:
        source: The model; its weights need not be loaded.
        config: Resolved for the model; `max_context` bounds every sequence.
        cuda: Whether a CUDA device computes.
        batch: Sequences.
        prompts, most: Tokens of each prompt, and most tokens of each sequence as far as
            `max_context` allows; without them every sequence is a prompt of `max_context` tokens.
        continued: Whether the sequences are continued later, by prompts of any length.
    """

    source: ModelSource
    config: OffloadConfig
    cuda: bool
    batch: int = 1
    prompts: tuple[int, ...] | None = None
    most: tuple[int, ...] | None = None
    continued: bool = False

    @property
    def context(self) -> int:
        """`max_context` of the config."""
        assert isinstance(self.config.max_context, int), "the config is resolved"
        return self.config.max_context

    @property
    def least_context(self) -> int:
        """The shortest `max_context` that leaves room for every prompt and one new token."""
        return 1 if self.prompts is None else max(self.prompts) + 1

    @property
    def lengths(self) -> list[int]:
        """Tokens of each prompt."""
        return [self.context] * self.batch if self.prompts is None else list(self.prompts)

    @property
    def capacities(self) -> list[int]:
        """Most tokens of each sequence."""
        if self.most is None:
            return [self.context] * self.batch
        return [min(capacity, self.context) for capacity in self.most]

    def of(self, **fields: object) -> Request:
        """The same with other fields of the config."""
        return dataclasses.replace(self, config=dataclasses.replace(self.config, **fields))  # type: ignore[arg-type]

    def shape(self) -> CacheShape:
        """What decides the bytes of everything but the weights."""
        return _cache_shape(self.source, self.config, self.lengths, self.capacities, self.cuda)

    def plan(self, gpu: int | None = None) -> MemoryPlan:
        """The bytes that it takes; with no more than `gpu` bytes of the device the prefill is streamed if need be."""
        return plan_memory(self.shape(), weight_bytes(self.source), gpu, self.continued)


def plan_request(
    source: ModelSource, config: OffloadConfig, prompts: list[int], capacities: list[int], cuda: bool = True
) -> MemoryPlan:
    """The memory plan of one call.

    Args:
        config: Resolved for the model.
        prompts: Tokens of each prompt.
        capacities: Most tokens of each sequence, prompt and answer.
        cuda: Whether a CUDA device computes.
    """
    return plan_memory(_cache_shape(source, config, prompts, capacities, cuda), weight_bytes(source))


def weight_bytes(source: ModelSource) -> int:
    """Bytes of the weights as they will be loaded."""
    return source.shape.parameters * source.dtype.itemsize


def active_experts(source: ModelSource) -> int:
    """Experts that a token goes through; 1 where the MLP is no mixture."""
    mixture = getattr(source.config, "num_local_experts", None) is not None
    return int(source.config.num_experts_per_tok) if mixture else 1


def _cache_shape(
    source: ModelSource, config: OffloadConfig, prompts: list[int], capacities: list[int], cuda: bool
) -> CacheShape:
    shape = source.shape
    window = AttentionWindow(config.sink_tokens, config.recent_tokens)
    budget = config.budget
    kept = max(window.selected(config.widest_budget.tokens(capacity), capacity) for capacity in set(capacities))
    rows = RowFormat.of(config.kv_dtype, source.dtype, shape.head_dim)
    everything = budget.fraction == 1
    kv_on_device = config.kv_location == "gpu"
    hot_slots = hot_set_capacity(config.hot_set_multiple, kept, max(capacities), window)
    # As `PrefetchScheduler` decides.
    wide = min(hot_slots, kept + kept // LOOK_AHEAD_PART)
    looks_ahead = (
        config.prefetch == "exact" and config.hot_set_multiple > 0 and wide > kept and not (kv_on_device or everything)
    )
    return CacheShape(
        layers=shape.layers,
        dense_layers=len(config.dense_layers),
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        active_experts=active_experts(source),
        vocab_size=shape.vocab_size,
        dtype=source.dtype,
        kv_dtype=rows.dtype,
        layout=rows.layout,
        labels=label_layout(config),
        window=window,
        most_kept=kept,
        hot_slots=hot_slots,
        segment_tokens=int(config.segment_tokens),
        prompts=prompts,
        capacities=capacities,
        kv_on_device=kv_on_device,
        kv_on_disk=config.kv_dir is not None,
        cuda=cuda,
        predicted=config.prefetch == "speculative" and kept > 0 and not everything,
        look_ahead=wide if looks_ahead else 0,
        top_p=budget.top_p is not None,
        everything=everything,
        monitored=config.monitor != "off",
        # As `PrefillLayers` decides.
        fused=cuda and shape.plain and source.dtype in FLOATS,
    )
