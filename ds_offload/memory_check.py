"""Refuses what will not fit, in one line, before memory is taken for it."""

from __future__ import annotations

import psutil
import torch

from ds_offload.config import OffloadConfig
from ds_offload.dtypes import torch_dtype
from ds_offload.errors import MemoryPlanError
from ds_offload.kernels.label_codec import LabelLayout
from ds_offload.loading import LoadedModel, ModelSource
from ds_offload.memory.plan import CUDA_RESERVE_BYTES, CacheShape, MemoryPlan, hot_set_capacity, plan_memory
from ds_offload.memory.window import AttentionWindow


def plan_request(source: ModelSource, config: OffloadConfig, prompts: list[int], capacities: list[int]) -> MemoryPlan:
    """The memory plan of one call.

    Args:
        config: Resolved for the model.
        prompts: Tokens of each prompt.
        capacities: Most tokens of each sequence, prompt and answer.
    """
    shape = source.shape
    window = AttentionWindow(config.sink_tokens, config.recent_tokens)
    kept = max(window.selected(config.budget.tokens(capacity), capacity) for capacity in capacities)
    assert config.label_channels is not None, "the config is resolved"
    cache = CacheShape(
        layers=shape.layers,
        dense_layers=len(config.dense_layers),
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        itemsize=source.dtype.itemsize,
        kv_itemsize=torch_dtype(config.kv_dtype).itemsize,
        label_row_bytes=LabelLayout(config.label_channels, config.label_bits).row_bytes,
        window=window,
        most_kept=kept,
        hot_slots=hot_set_capacity(config.hot_set, kept, max(capacities), window),
        segment_tokens=int(config.segment_tokens),
        prompts=prompts,
        capacities=capacities,
        kv_on_device=config.kv_location == "gpu",
    )
    return plan_memory(cache, weight_bytes(source))


def weight_bytes(source: ModelSource) -> int:
    """Bytes of the weights as they will be loaded."""
    return source.shape.parameters * source.dtype.itemsize


def check_weights(source: ModelSource, config: OffloadConfig, device: torch.device) -> None:
    """Refuse weights that do not fit the device.

    Raises:
        MemoryPlanError: They do not; nothing has been loaded.
    """
    weights = weight_bytes(source)
    if device.type == "cuda":
        _compare("GPU", weights + CUDA_RESERVE_BYTES, _gpu_limit(config, device), "the weights", "gpu_memory")
    else:
        _compare("host", weights, _host_limit(config), "the weights", "host_memory")


def check_request(loaded: LoadedModel, config: OffloadConfig, prompts: list[int], capacities: list[int]) -> MemoryPlan:
    """The plan of a call, refused if its caches do not fit, the weights being loaded already.

    Raises:
        MemoryPlanError: GPU or host memory is short.
    """
    plan = plan_request(loaded.source, config, prompts, capacities)
    what = f"{sum(capacities):,} tokens"
    if loaded.device.type == "cuda":
        limit = _gpu_limit(config, loaded.device, plan.weights)
        _compare("GPU", plan.gpu_total, limit, what, "gpu_memory")
        _compare("host", plan.host_kv, _host_limit(config), what, "host_memory")
    else:
        taken = plan.gpu_tensors - plan.weights + plan.host_kv
        _compare("host", taken, _host_limit(config), what, "host_memory")
    return plan


def _gpu_limit(config: OffloadConfig, device: torch.device, loaded: int = 0) -> int:
    if isinstance(config.gpu_memory, int):
        return config.gpu_memory
    free, _ = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    # What is free counts neither the weights nor the context, which are there already.
    return free + cached + (loaded + CUDA_RESERVE_BYTES if loaded else 0)


def _host_limit(config: OffloadConfig) -> int:
    available = psutil.virtual_memory().available
    return min(available, config.host_memory) if isinstance(config.host_memory, int) else available


def _compare(place: str, needed: int, limit: int, what: str, field: str) -> None:
    if needed > limit:
        raise MemoryPlanError(
            f"{what} need {needed / 2**30:.2f} GiB of {place} memory and {limit / 2**30:.2f} GiB are there ({field}); "
            "shorten the prompt or answer, lower --token-budget or --hot-set, or choose a smaller model"
        )
