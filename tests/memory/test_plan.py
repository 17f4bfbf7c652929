"""The formulas of the memory plan: what grows with what, and what a graph keeps."""

from __future__ import annotations

import dataclasses
import mmap
import random
from typing import Any

import pytest
import torch

from ds_offload.kernels.kv_codec import RowLayout
from ds_offload.kernels.label_codec import LabelLayout
from ds_offload.kernels.product_code import ProductLayout
from ds_offload.memory.plan import CUDA_RESERVE_BYTES, CacheShape, hot_set_capacity, plan_memory
from ds_offload.memory.window import AttentionWindow
from ds_offload.memory.workspace import (
    CHUNK_BYTES,
    WRITTEN_SEGMENTS,
    chunk_tokens,
    decode_bytes,
    prefill_bytes,
    prefill_mode,
    streamed_prefill_bytes,
)

WINDOW = AttentionWindow(4, 64)


def cache_shape(tokens: int = 1 << 17, batch: int = 1, **changes: Any) -> CacheShape:
    """Llama-2-7B's shape with the default config."""
    kept = WINDOW.selected(-(-tokens // 16), tokens)
    fields: dict[str, Any] = {
        "layers": 32,
        "dense_layers": 0,
        "heads": 32,
        "kv_heads": 32,
        "head_dim": 128,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "active_experts": 1,
        "vocab_size": 32000,
        "dtype": torch.bfloat16,
        "kv_dtype": torch.bfloat16,
        "labels": LabelLayout(60, 2),
        "window": WINDOW,
        "most_kept": kept,
        "hot_slots": hot_set_capacity(2, kept, tokens, WINDOW),
        "segment_tokens": 1024,
        "prompts": [tokens] * batch,
        "capacities": [tokens] * batch,
        "kv_on_device": False,
        "cuda": True,
        "predicted": False,
        "look_ahead": kept + kept // 4,
        "top_p": False,
        "everything": False,
        "monitored": False,
    }
    return CacheShape(**fields | changes)


def test_a_long_context_of_llama_2_7b() -> None:
    tokens = 1 << 17
    plan = plan_memory(cache_shape(), weights=1000)
    assert plan.labels == 32 * 32 * tokens * 16
    assert plan.host_kv == 32 * 32 * tokens * 512
    assert plan.reserve == CUDA_RESERVE_BYTES
    assert plan.gpu_total == plan.gpu_tensors + CUDA_RESERVE_BYTES
    there = 1000 + plan.labels + plan.window + plan.buffers
    assert plan.prefill_tensors == there + plan.prefill < plan.step_tensors == there + plan.hot_set + plan.decode
    assert plan.gpu_tensors == plan.step_tensors, "the prompt's workspace is gone when the hot set is made"
    kept = tokens * (2 * (4096 + 4096 + 4 * 4096 + 256) + 8)
    assert plan.prefill == kept + CHUNK_BYTES + 8 * 4096 * 32 * 60


def test_fused_kernels_take_less_for_a_chunk_of_a_prompt() -> None:
    short = cache_shape(1024, labels=ProductLayout(128))
    kept = 1024 * (2 * (4096 + 4096 + 4 * 4096 + 256) + 8)
    # The norm, gate and up; without fused kernels what transformers' MLP makes besides; a block of attention is less.
    assert prefill_bytes(dataclasses.replace(short, fused=True)) - kept == 1024 * 2 * (4096 + 2 * 11008)
    assert prefill_bytes(short) - kept == 1024 * 2 * (4 * 4096 + 4 * 11008)
    narrow = dataclasses.replace(short, intermediate_size=256, fused=True)
    assert prefill_bytes(narrow) - kept == 1024 * 2 * (4096 + 3 * 4096)


def test_product_codes_are_counted_with_their_labels_and_prompts_need_no_copy_for_them() -> None:
    tokens, scalar, product = 1 << 17, cache_shape(), cache_shape(labels=ProductLayout(128))
    plan = plan_memory(product, weights=1000)
    assert plan.labels == 32 * 32 * (tokens * 16 + 4 * (128 + 2 * 128**2 + 16 * 128))
    assert plan_memory(cache_shape(labels=ProductLayout(128), cuda=False), 0).labels == 32 * 32 * tokens * 16
    assert prefill_bytes(scalar) - prefill_bytes(product) == 8 * 4096 * 32 * 60
    grouped = [cache_shape(heads=64, kv_heads=16, labels=labels) for labels in (LabelLayout(60, 2), ProductLayout(128))]
    # Of each query head 16 bits a token, and its share of a table; of each KV head's scores, lent in every layer, half.
    more = decode_bytes(grouped[1]) - decode_bytes(grouped[0]) + 32 * 16 * tokens * 2
    assert 0 < more <= 64 * tokens * 2 + 64 * 32 * 64


def test_what_other_streams_read_stays_until_a_graph_is_captured() -> None:
    """Scores of every layer with a look-ahead, and the predicted tokens of every layer."""
    scores = 32 * (1 << 17) * 4
    tokens = 32 * cache_shape().most_kept * 8
    alone = decode_bytes(cache_shape(look_ahead=0))
    assert scores < alone < scores + 24 * 2**20
    ahead = decode_bytes(cache_shape())
    assert 31 * scores < ahead - alone < 31 * scores + 24 * 2**20
    predicted = decode_bytes(cache_shape(look_ahead=0, predicted=True))
    assert scores + 32 * tokens < predicted - alone < scores + 32 * tokens + 24 * 2**20
    on_cpu = decode_bytes(cache_shape(cuda=False))
    assert on_cpu < alone + 200 * 2**20


def test_nothing_is_scored_where_nothing_or_everything_is_kept() -> None:
    scores = 32 * (1 << 17) * 4
    nothing = cache_shape(most_kept=0, hot_slots=1, look_ahead=0)
    everything = cache_shape(everything=True, look_ahead=0)
    assert decode_bytes(nothing) < scores / 4
    assert decode_bytes(everything) < decode_bytes(cache_shape(look_ahead=0))
    assert not nothing.scored and not everything.scored


def test_top_p_sorts() -> None:
    for cuda in (True, False):
        sizes = {"cuda": cuda, "most_kept": 100, "hot_slots": 200, "look_ahead": 0}
        assert decode_bytes(cache_shape(top_p=True, **sizes)) > 2 * decode_bytes(cache_shape(**sizes))


def test_the_cpu_scores_every_query_head() -> None:
    shape = cache_shape(kv_heads=8, cuda=False, batch=3)
    assert decode_bytes(shape) > 3 * 32 * (1 << 17) * 4
    assert plan_memory(shape, 0).reserve == 0


def test_a_batch_shares_the_prefill_and_nothing_else() -> None:
    one, four = (plan_memory(cache_shape(batch=n), 0) for n in (1, 4))
    assert one.prefill == four.prefill
    for name in ("labels", "window", "hot_set", "buffers", "host_kv"):
        assert getattr(four, name) == 4 * getattr(one, name)


def test_prefill_does_not_depend_on_the_layers() -> None:
    assert prefill_bytes(cache_shape()) == prefill_bytes(cache_shape(layers=80))


def test_rows_of_another_dtype_are_copied_a_few_segments_at_a_time() -> None:
    same, other = (prefill_bytes(cache_shape(kv_dtype=dtype)) for dtype in (torch.bfloat16, torch.float32))
    assert other - same == WRITTEN_SEGMENTS * 1024 * 32 * 128 * 2 * 4 - 8 * 4096 * 32 * 60


def test_experts_take_their_workspace_each() -> None:
    one, two = (prefill_bytes(cache_shape(active_experts=n)) for n in (1, 2))
    tokens = chunk_tokens(4096, 11008, 2)
    assert two - one == tokens * ((4 * 11008 + 4096) * 2 + 2 * 96) + tokens * (4 * 11008 + 4 * 4096) * 2 - CHUNK_BYTES


def test_segments_of_the_host_are_whole_pages() -> None:
    plan = plan_memory(cache_shape(tokens=100, segment_tokens=7, layers=1, kv_heads=1, heads=1, head_dim=16), 0)
    assert plan.host_kv == 15 * mmap.PAGESIZE
    on_device = plan_memory(
        cache_shape(tokens=100, segment_tokens=7, layers=1, kv_heads=1, heads=1, head_dim=16, kv_on_device=True), 0
    )
    assert on_device.host_kv == 0 and on_device.hot_set == 0
    assert on_device.buffers == 64 + 15 * 7 * 64


def test_chunks_stay_within_their_workspace() -> None:
    for hidden, intermediate, itemsize in ((64, 128, 4), (4096, 11008, 2), (8192, 28672, 2)):
        tokens = chunk_tokens(hidden, intermediate, itemsize)
        assert tokens % 64 == 0
        assert tokens == 256 or tokens * 4 * (hidden + intermediate) * itemsize <= CHUNK_BYTES


def test_the_hot_set_holds_a_selection_and_no_more_than_the_candidates() -> None:
    assert hot_set_capacity(2.0, 100, 10_000, WINDOW) == 200
    assert hot_set_capacity(2.0, 100, 219, WINDOW) == 150
    assert hot_set_capacity(1.0, 0, 50, WINDOW) == 1


@pytest.mark.parametrize("seed", range(20))
def test_a_longer_context_never_takes_less(seed: int) -> None:
    """The search for the longest context that fits rests on it."""
    draw = random.Random(seed)
    batch, fixed = draw.choice((1, 3)), draw.choice((None, 500, 40_000))
    changes = {
        "kv_heads": draw.choice((1, 8, 32)),
        "cuda": draw.random() < 0.5,
        "predicted": draw.random() < 0.3,
        "top_p": draw.random() < 0.3,
        "kv_on_device": draw.random() < 0.3,
        "labels": draw.choice((LabelLayout(60, 2), LabelLayout(8, 16), LabelLayout(20, 8), ProductLayout(128))),
        "kv_dtype": draw.choice((torch.bfloat16, torch.float32)),
    }
    hot_set, looks_ahead = draw.choice((0, 1, 2, 4)), draw.random() < 0.5
    before = None
    steps = [draw.randrange(1, 1 << 20) for _ in range(30)]
    steps += [n + more for n in (4096, 16_384, 1 << 18, 2 * 524_272) for more in (-1, 0, 1)]
    for tokens in sorted(steps):
        kept = WINDOW.selected(-(-tokens // 16) if fixed is None else min(fixed, tokens), tokens)
        slots = hot_set_capacity(hot_set, kept, tokens, WINDOW)
        wide = min(slots, kept + kept // 4)
        sizes = {"most_kept": kept, "hot_slots": slots, "look_ahead": wide if looks_ahead and wide > kept else 0}
        plan = plan_memory(cache_shape(tokens, batch, **changes | sizes), 0)
        if before is not None:
            assert plan.gpu_total >= before.gpu_total
            assert plan.host_kv >= before.host_kv
            assert all(now >= then for now, then in zip(*map(dataclasses.astuple, (plan, before)), strict=True))
        before = plan


def test_a_prefill_is_streamed_where_the_whole_prompt_does_not_fit() -> None:
    shape = cache_shape()
    whole, streamed = prefill_bytes(shape), streamed_prefill_bytes(shape)
    assert streamed < whole / 3
    assert [prefill_mode(shape, room) for room in (None, whole, whole - 1, 0)] == ["whole"] * 2 + ["streamed"] * 2
    # Longer prompts take no more.
    assert streamed_prefill_bytes(cache_shape(tokens=1 << 19)) == streamed
    short = cache_shape(tokens=1000)
    assert prefill_mode(short, 0) == "whole", "one piece of it is the whole prompt"


def test_the_plan_of_a_streamed_prefill_has_the_hidden_states_on_the_host() -> None:
    shape = cache_shape()
    whole = plan_memory(shape, 1000, None)
    enough = whole.prefill_tensors + whole.reserve
    assert enough < whole.gpu_total and plan_memory(shape, 1000, enough) == whole
    streamed = plan_memory(shape, 1000, enough - 1)
    assert (streamed.prefill_mode, streamed.host_states) == ("streamed", (1 << 17) * 4096 * 2)
    assert whole.prefill_tensors - streamed.prefill_tensors == whole.prefill - streamed.prefill
    assert dataclasses.replace(streamed, prefill=whole.prefill, prefill_mode="whole", host_states=0) == whole
    assert plan_memory(cache_shape(cuda=False), 0, 0).host_states == 0


def test_later_turns_have_their_workspace() -> None:
    """A short prompt that is continued: turns of any length, a piece at a time."""
    shape = cache_shape(prompts=[100])
    alone, continued = (plan_memory(shape, weights=1, continued=later) for later in (False, True))
    turn = streamed_prefill_bytes(cache_shape())
    assert alone.prefill == continued.prefill == prefill_bytes(shape)
    assert alone.turn == 0 < continued.turn == turn + decode_bytes(shape)
    assert continued.step_tensors - alone.step_tensors == turn, "a turn comes beside the hot set"
    assert dataclasses.replace(continued, turn=0) == alone


def test_a_copy_of_the_window_is_planned_for_quantised_rows_that_are_continued() -> None:
    shape = cache_shape(layout=RowLayout(8, 128))
    alone, continued = (plan_memory(shape, weights=1, continued=later) for later in (False, True))
    # 4 sinks, 64 recent tokens and the current one, K and V in 16 bits.
    assert continued.buffers - alone.buffers == 32 * 32 * 69 * 2 * 128 * 2
    assert dataclasses.replace(continued, buffers=alone.buffers, turn=0) == alone
