"""The memory plan: every byte on device and host, from shapes alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ds_offload.kernels.admit_state import page_dtype
from ds_offload.memory.window import AttentionWindow

# The CUDA context, its libraries' workspaces and the allocator's rounding.
CUDA_RESERVE_BYTES = 768 * 2**20

# Workspace of one chunk of tokens in norms and MLP, and of one block of heads in attention.
CHUNK_BYTES = 256 * 2**20

# Device bytes by which the hot set knows a slot: three numbers of 4 bytes (`AdmitState`).
_SLOT_BYTES = 12


def chunk_tokens(hidden_size: int, intermediate_size: int, itemsize: int) -> int:
    """Prompt tokens per chunk such that the MLP's intermediate tensors stay within `CHUNK_BYTES`."""
    per_token = (4 * intermediate_size + 4 * hidden_size) * itemsize
    return max(256, CHUNK_BYTES // per_token // 64 * 64)


def hot_set_capacity(hot_set: float, most_kept: int, longest: int, window: AttentionWindow) -> int:
    """Slots of the hot set: a multiple of the selected tokens, and no more than there are candidates."""
    candidates = max(1, longest - window.forced_slots)
    return max(1, most_kept, min(candidates, round(hot_set * most_kept)))


@dataclass(frozen=True)
class CacheShape:
    """What decides the size of everything but the weights.

    Attributes:
        layers, dense_layers: Decoder layers, and how many of them keep their K/V on the device.
        itemsize, kv_itemsize: Bytes of an element of the model and of the stored K/V.
        label_row_bytes: Bytes of one label.
        most_kept: Most candidates a KV head keeps at a step.
        hot_slots: Slots of the hot set per layer and KV head.
        prompts, capacities: Tokens of each prompt, and most tokens of each sequence.
        kv_on_device: Whether the store is on the device (`kv_location="gpu"`).
    """

    layers: int
    dense_layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    itemsize: int
    kv_itemsize: int
    label_row_bytes: int
    window: AttentionWindow
    most_kept: int
    hot_slots: int
    segment_tokens: int
    prompts: Sequence[int]
    capacities: Sequence[int]
    kv_on_device: bool


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by use. `gpu_total` is the peak: prefill and decode workspaces do not coexist.

    Attributes:
        weights: The model's parameters.
        labels: The label cache.
        hot_set: Device rows: sinks, recent window and hot set, with their bookkeeping.
        buffers: The new token's rows, dense layers' K/V and, with `kv_location="gpu"`,
            the store.
        prefill: The longest prompt's hidden states, queries, two layers' K/V, RoPE,
            and the chunk workspace.
        decode: Scores and their copies in selection.
        reserve: CUDA context and allocator.
        host_kv: The store on the host.
    """

    weights: int
    labels: int
    hot_set: int
    buffers: int
    prefill: int
    decode: int
    reserve: int
    host_kv: int

    @property
    def gpu_tensors(self) -> int:
        """Peak bytes of tensors on the device, without the reserve."""
        return self.weights + self.labels + self.hot_set + self.buffers + max(self.prefill, self.decode)

    @property
    def gpu_total(self) -> int:
        """Peak bytes on the device."""
        return self.gpu_tensors + self.reserve


def plan_memory(shape: CacheShape, weights: int) -> MemoryPlan:
    """Add up what a run of `shape` takes, given the bytes of the weights."""
    offloaded = shape.layers - shape.dense_layers
    sequences, tokens = len(shape.capacities), sum(shape.capacities)
    head_row = 2 * shape.head_dim * shape.kv_itemsize
    segments = sum(-(-capacity // shape.segment_tokens) for capacity in shape.capacities)
    store = offloaded * segments * shape.segment_tokens * shape.kv_heads * head_row
    rows = sequences * shape.kv_heads
    slots = shape.window.forced_slots + shape.hot_slots
    longest, prompt = max(shape.capacities), max(shape.prompts)
    page = longest * page_dtype(shape.hot_slots).itemsize
    hot_set = offloaded * rows * (slots * head_row + shape.hot_slots * _SLOT_BYTES + page + 4)
    buffers = shape.layers * rows * head_row
    buffers += shape.dense_layers * tokens * shape.kv_heads * head_row
    return MemoryPlan(
        weights=weights,
        labels=shape.layers * shape.kv_heads * tokens * shape.label_row_bytes,
        hot_set=0 if shape.kv_on_device else hot_set,
        buffers=buffers + (store if shape.kv_on_device else 0),
        prefill=_prefill_bytes(shape, prompt),
        # Scores, the softmax of them, their sum over a group, its masked copy, top-k's copies.
        decode=sequences * longest * (2 * shape.heads + 4 * shape.kv_heads) * 4,
        reserve=CUDA_RESERVE_BYTES,
        host_kv=0 if shape.kv_on_device else store,
    )


def _prefill_bytes(shape: CacheShape, prompt: int) -> int:
    per_token = shape.hidden_size + shape.heads * shape.head_dim + 2 * shape.kv_heads * 2 * shape.head_dim
    per_token += 2 * shape.head_dim
    chunk = min(prompt, chunk_tokens(shape.hidden_size, shape.intermediate_size, shape.itemsize))
    chunk_bytes = chunk * (4 * shape.intermediate_size + 4 * shape.hidden_size) * shape.itemsize
    group = prompt * shape.heads // shape.kv_heads * shape.head_dim * shape.itemsize
    attention = min(prompt * shape.heads * shape.head_dim * shape.itemsize, max(CHUNK_BYTES, group))
    return prompt * per_token * shape.itemsize + max(chunk_bytes, attention)
