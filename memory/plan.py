"""The memory plan: every byte on device and host, from shapes alone."""

from __future__ import annotations

import dataclasses
import mmap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from ds_offload.kernels.admit_state import AdmitState
from ds_offload.kernels.kv_codec import RowLayout
from ds_offload.kernels.label_codec import LabelLayout
from ds_offload.kernels.product_code import ProductLayout, code_bytes
from ds_offload.memory.staging_ring import RING_BYTES
from ds_offload.memory.window import AttentionWindow
from ds_offload.memory.workspace import (
    PrefillMode,
    decode_bytes,
    hidden_state_bytes,
    prefill_bytes,
    prefill_mode,
    streamed_prefill_bytes,
)

# The CUDA context, its libraries' workspaces and the allocator's rounding.
CUDA_RESERVE_BYTES = 768 * 2**20


def hot_set_capacity(hot_set: float, most_kept: int, longest: int, window: AttentionWindow) -> int:
    """Slots of the hot set: a multiple of the selected tokens, and no more than there are candidates."""
    candidates = max(1, longest - window.forced_slots)
    return max(1, most_kept, min(candidates, round(hot_set * most_kept)))


@dataclass(frozen=True)
class CacheShape:
    """What decides the size of everything but the weights.

    Attributes:
        layers, dense_layers: Decoder layers, and how many of them keep their K/V on the device.
        active_experts: Experts that a token goes through; 1 where the MLP is no mixture.
        dtype, kv_dtype: Of the model, and of K/V that are not quantised.
        labels: How a label is stored.
        most_kept: Most candidates a KV head keeps at a step.
        hot_slots: Slots of the hot set per layer and KV head.
        prompts, capacities: Tokens of each prompt, and most tokens of each sequence.
        kv_on_device: Whether the store is on the device (`kv_location="gpu"`).
        kv_on_disk: Whether the store is in files (`kv_dir`).
        cuda: Whether that is a CUDA device, whose kernels take another workspace than the CPU's code.
        predicted: Whether the next layer's tokens are selected while a layer computes.
        look_ahead: Tokens of a KV head that are brought on the device for the next step, 0 for none.
        top_p: Whether scores are sorted to find how many tokens to keep.
        everything: Whether every candidate is kept, and nothing scored.
        monitored: Whether attention is compared with exact attention between steps.
        layout: The bytes of quantised rows; None where the store has rows of `kv_dtype`.
        fused: Whether fused kernels run a prompt's norms and MLPs.
    """

    layers: int
    dense_layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    active_experts: int
    vocab_size: int
    dtype: torch.dtype
    kv_dtype: torch.dtype
    labels: LabelLayout | ProductLayout
    window: AttentionWindow
    most_kept: int
    hot_slots: int
    segment_tokens: int
    prompts: Sequence[int]
    capacities: Sequence[int]
    kv_on_device: bool
    cuda: bool
    predicted: bool
    look_ahead: int
    top_p: bool
    everything: bool
    monitored: bool
    layout: RowLayout | None = None
    kv_on_disk: bool = False
    fused: bool = False

    @property
    def rows(self) -> int:
        """Sequences times KV heads."""
        return len(self.capacities) * self.kv_heads

    @property
    def row_bytes(self) -> int:
        """Stored K and V of one token of one KV head."""
        return self.plain_row_bytes if self.layout is None else self.layout.row_bytes

    @property
    def plain_row_bytes(self) -> int:
        """The same where they are not quantised: in the window, in dense layers, and of a new token."""
        return 2 * self.head_dim * self.kv_dtype.itemsize

    @property
    def scored(self) -> bool:
        """Whether a step computes label scores."""
        return self.most_kept > 0 and not self.everything

    @property
    def weighed(self) -> bool:
        """Whether scores of query heads become attention weights, summed over a KV head's group."""
        return self.top_p or self.heads > self.kv_heads

    @property
    def whole_scores(self) -> bool:
        """Whether scores are whole numbers of 16 bits (`kernels/product_scores.py`), not of 32."""
        return isinstance(self.labels, ProductLayout) and not self.top_p


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by use. `gpu_total` is the peak: a prompt's workspace is gone when the hot set and a step's are made.

    Attributes:
        weights: The model's parameters.
        labels: The label cache, and the codes of product labels.
        window: Device rows of sinks and recent window.
        hot_set: Those of selected tokens, with their bookkeeping; there from the first step on.
        buffers: The new token's rows, dense layers' K/V and, with `kv_location="gpu"`,
            the store. With quantised sequences that are continued later, a copy of the window.
        prefill: Workspace of the longest prompt: hidden states, queries, two layers' K/V, RoPE, chunks.
            With a streamed prefill that of one piece of it.
        decode: Workspace of a step: scores and selections in flight, attention, logits.
        turn: Workspace of a later turn's prompt, beside that of a step; 0 where nothing is continued.
        reserve: CUDA context and allocator; 0 on a CPU.
        host_kv: The store on the host; of one in files the ring through which its rows pass to a CUDA device.
        disk_kv: The store in files. What the system keeps of them in memory it gives back when that is wanted.
        prefill_mode: Whether the prompt is on the device as a whole, or streamed.
        host_states: The prompt's hidden states on the host, while a streamed prefill lasts.
    """

    weights: int
    labels: int
    window: int
    hot_set: int
    buffers: int
    prefill: int
    decode: int
    turn: int
    reserve: int
    host_kv: int
    prefill_mode: PrefillMode = "whole"
    host_states: int = 0
    disk_kv: int = 0

    @property
    def prefill_tensors(self) -> int:
        """Peak bytes of tensors on the device until the first prompts are read."""
        return self.weights + self.labels + self.window + self.buffers + self.prefill

    @property
    def step_tensors(self) -> int:
        """The same from the first step on."""
        return self.weights + self.labels + self.window + self.hot_set + self.buffers + max(self.decode, self.turn)

    @property
    def gpu_tensors(self) -> int:
        """Peak bytes of tensors on the device, without the reserve."""
        return max(self.prefill_tensors, self.step_tensors)

    @property
    def gpu_total(self) -> int:
        """Peak bytes on the device."""
        return self.gpu_tensors + self.reserve


def plan_memory(shape: CacheShape, weights: int, gpu: int | None = None, continued: bool = False) -> MemoryPlan:
    """Add up what a run of `shape` takes, given the bytes of the weights.

    Args:
        gpu: Bytes of the device that may be taken: where a prompt's workspace does not
            fit them, its prefill is streamed. None plans without a limit.
        continued: Whether the sequences are continued later: prompts longer than a piece are streamed then.
    """
    offloaded = shape.layers - shape.dense_layers
    tokens = sum(shape.capacities)
    counts = Counter(shape.capacities)
    segments = sum(count * -(-capacity // shape.segment_tokens) for capacity, count in counts.items())
    segment = offloaded * shape.segment_tokens * shape.kv_heads * shape.row_bytes
    if not shape.kv_on_device:
        # A block of host memory is whole pages.
        segment = -(-segment // mmap.PAGESIZE) * mmap.PAGESIZE
    window = hot_set = 0
    if not shape.kv_on_device or shape.layout is not None:
        window = offloaded * shape.rows * shape.window.forced_slots * shape.plain_row_bytes
    if not shape.kv_on_device:
        hot_set = offloaded * (shape.rows * shape.hot_slots * shape.row_bytes + _admit_bytes(shape))
    buffers = shape.layers * shape.rows * shape.plain_row_bytes
    buffers += shape.dense_layers * tokens * shape.kv_heads * shape.plain_row_bytes
    buffers += segments * segment if shape.kv_on_device else 0
    labels = shape.layers * shape.kv_heads * tokens * shape.labels.row_bytes
    # On a CPU they are the calibration's own.
    if shape.cuda and isinstance(shape.labels, ProductLayout):
        labels += code_bytes(shape.layers, shape.kv_heads, shape.head_dim)
    reserve = CUDA_RESERVE_BYTES if shape.cuda else 0
    decode, turn = decode_bytes(shape), 0
    if continued:
        # The graph of the steps before keeps its workspace while a later turn is read.
        turn = streamed_prefill_bytes(dataclasses.replace(shape, prompts=shape.capacities)) + decode
        if shape.layout is not None:
            # A copy of the window, while a question is answered.
            buffers += window
    mode = prefill_mode(shape, None if gpu is None else gpu - weights - labels - window - buffers - reserve)
    return MemoryPlan(
        weights=weights,
        labels=labels,
        window=window,
        hot_set=hot_set,
        buffers=buffers,
        prefill=prefill_bytes(shape) if mode == "whole" else streamed_prefill_bytes(shape),
        decode=decode,
        turn=turn,
        reserve=reserve,
        host_kv=_host_kv(shape, segments * segment),
        prefill_mode=mode,
        host_states=hidden_state_bytes(shape) if mode == "streamed" and shape.cuda else 0,
        disk_kv=segments * segment if shape.kv_on_disk else 0,
    )


def _host_kv(shape: CacheShape, store: int) -> int:
    """Bytes of host memory for a store of `store` bytes."""
    if shape.kv_on_disk:
        return RING_BYTES[0] if shape.cuda else 0
    return 0 if shape.kv_on_device else store


def _admit_bytes(shape: CacheShape) -> int:
    """By which the hot set of a layer knows its slots: those of a state that takes no memory."""
    heads = (len(shape.capacities), shape.kv_heads)
    state = AdmitState.empty(*heads, shape.hot_slots, max(shape.capacities), torch.device("meta"))
    return sum(getattr(state, field.name).nbytes for field in fields(state))
