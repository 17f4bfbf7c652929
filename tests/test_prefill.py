"""A prompt in one piece, in turns and streamed: the same logits, K/V, labels, window and answer."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from prefill_case import LENGTH, NEW, State, make, run
from tiny_models import random_prompts, save_tiny, tiny_config

import ds_offload.prefill
import ds_offload.stored_blocks
from ds_offload.decode import DecodeLoop
from ds_offload.kv_context import KVContext
from ds_offload.prefetch.streams import Faults
from ds_offload.prefill import prefill
from ds_offload.prefill_layers import PrefillLayers


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces and blocks of stored rows of sizes that divide nothing."""
    monkeypatch.setattr(ds_offload.prefill, "piece_tokens", lambda heads, head_dim: 37)
    monkeypatch.setattr(ds_offload.stored_blocks, "stream_tokens", lambda kv_heads, row_bytes: 23)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("turns", [[1], [149], [64], [3, 4], [16, 90], [50, 100, 101, 149]])
@pytest.mark.parametrize("streamed", [False, True])
def test_turns_equal_one_piece(turns: list[int], streamed: bool, tmp_path: Path) -> None:
    save_tiny(tmp_path, tiny_config("llama"))
    ids = random_prompts(LENGTH)[0]
    with make(tmp_path) as gen:
        run(gen, ids, turns, streamed).check(run(gen, ids, []))


@pytest.mark.parametrize("ready", [(), (0,), (1, 2), (1, 2, 3)])
def test_rows_wait_on_the_device_for_their_own_layer_alone(
    ready: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(tmp_path, tiny_config("llama", 2, num_hidden_layers=4))
    ids = random_prompts(LENGTH)[0]
    events: list[tuple[str, int]] = []
    project, write = PrefillLayers.project, KVContext.write_prompt

    def projecting(self: PrefillLayers, layer: int, *arguments: Any) -> None:
        events.append(("projected", layer))
        project(self, layer, *arguments)

    def writing(self: KVContext, layer: int, *arguments: Any, **options: Any) -> None:
        events.append(("written", layer))
        write(self, layer, *arguments, **options)

    with make(tmp_path) as gen:
        expected = run(gen, ids, [])
        monkeypatch.setattr(PrefillLayers, "project", projecting)
        monkeypatch.setattr(KVContext, "write_prompt", writing)
        monkeypatch.setattr(KVContext, "has_room", lambda self, sequence, tokens, layer: layer in ready)
        run(gen, ids, []).check(expected)
    # A buffer is needed again two layers later; at the end all of it leaves.
    due = {layer: layer if layer in ready else min(layer + 1, 3) for layer in range(4)}
    expected_events = []
    for layer in range(4):
        expected_events.append(("projected", layer))
        expected_events += [("written", n) for n in sorted(range(4), key=lambda n: n not in ready) if due[n] == layer]
    assert list(dict.fromkeys(events)) == expected_events


@pytest.mark.usefixtures("small")
def test_a_piece_is_written_before_the_next_reads_it_back_wherever_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(tmp_path, tiny_config("llama"))
    ids = random_prompts(LENGTH)[0]
    with make(tmp_path) as gen:
        whole = run(gen, ids, [])
        monkeypatch.setattr(KVContext, "has_room", lambda *_: False)
        run(gen, ids, [], streamed=True).check(whole)


CASES: dict[str, tuple[str, int, dict[str, Any], dict[str, Any]]] = {
    "one query head a KV head": ("llama", 4, {}, {}),
    "one KV head": ("llama", 1, {}, {}),
    "experts": ("mixtral", 2, {}, {}),
    "biases": ("qwen2", 2, {}, {}),
    "head norms": ("qwen3", 2, {}, {}),
    "store on the device": ("llama", 2, {"kv_location": "gpu"}, {}),
    "dense layer": ("llama", 2, {"dense_layers": (1,)}, {}),
    "no sinks, a long window": ("llama", 2, {"sink_tokens": 0, "recent_tokens": 60, "token_budget": 90}, {}),
    "many sinks": ("llama", 2, {"sink_tokens": 70, "recent_tokens": 1, "token_budget": 90}, {}),
    "a head dim of 24": ("llama", 2, {}, {"hidden_size": 96, "num_attention_heads": 4, "head_dim": 24}),
}


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", CASES)
def test_models_and_settings(name: str, tmp_path: Path) -> None:
    family, kv_heads, changes, sizes = CASES[name]
    save_tiny(tmp_path, tiny_config(family, kv_heads, **sizes))
    ids = random_prompts(LENGTH)[0]
    with make(tmp_path, **changes) as gen:
        whole = run(gen, ids, [])
        run(gen, ids, [61, 62]).check(whole)
        run(gen, ids, [], streamed=True).check(whole)


@pytest.mark.usefixtures("small")
def test_stored_rows_of_a_shorter_dtype(tmp_path: Path) -> None:
    """Earlier tokens are attended to as they were stored."""
    save_tiny(tmp_path, tiny_config("llama", initializer_range=0.05))
    ids = random_prompts(LENGTH)[0]
    with make(tmp_path, kv_dtype="bf16") as gen:
        whole, turns = run(gen, ids, []), run(gen, ids, [70])
        relative = (turns.logits - whole.logits).norm() / whole.logits.norm()
        assert 0 < relative < 2e-2
        for mine, others in zip(turns.rows, whole.rows, strict=True):
            torch.testing.assert_close(mine, others, rtol=3e-2, atol=3e-2)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("changes", [{}, {"dense_layers": (1,)}, {"kv_location": "gpu"}])
@pytest.mark.parametrize(("kv_dtype", "tolerance"), [("int8", 0.01), ("int4", 0.12)])
def test_quantised_rows(kv_dtype: str, tolerance: float, changes: dict[str, Any], tmp_path: Path) -> None:
    """Turns and pieces read earlier tokens back as they were quantised; the window is as the model made it."""
    save_tiny(tmp_path, tiny_config("llama", initializer_range=0.05))
    ids = random_prompts(LENGTH)[0]
    with make(tmp_path, kv_dtype=kv_dtype, **changes) as gen:
        whole = run(gen, ids, [])
        for other in (run(gen, ids, [70, 71]), run(gen, ids, [], streamed=True)):
            for mine, others in zip(
                [other.logits, *other.rows, *other.window], [whole.logits, *whole.rows, *whole.window], strict=True
            ):
                assert (mine - others).norm() / others.norm() < tolerance
            assert (other.logits - whole.logits).norm() > 0
            assert torch.equal(other.rows[0], whole.rows[0]), "the first layer's rows follow from the tokens alone"


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("kind", ["dynamic", "yarn"])
def test_a_streamed_prompt_turns_by_its_whole_length(kind: str, tmp_path: Path) -> None:
    rope = {"rope_type": kind, "factor": 2.0, "rope_theta": 10000.0}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = 64
    save_tiny(tmp_path, tiny_config("llama", max_position_embeddings=64, rope_parameters=rope))
    ids = random_prompts(LENGTH)[0]
    with make(tmp_path, max_context=256 if kind == "dynamic" else 128, segment_tokens=7) as gen:
        ids = ids[:120]
        run(gen, ids, [], streamed=True).check(run(gen, ids, []))


@pytest.mark.usefixtures("small")
@torch.no_grad()
def test_a_turn_behind_decode_steps(tmp_path: Path) -> None:
    """The rows, labels and window that steps wrote are what the next turn attends to and what it leaves."""
    save_tiny(tmp_path, tiny_config("llama"))
    ids = random_prompts(LENGTH)[0]
    with make(tmp_path, token_budget="1/1") as gen:
        whole = run(gen, ids, [])
        assert gen._calibration is not None
        with KVContext(gen.decoder, gen.config, gen._calibration, [LENGTH + NEW]) as context:
            prefill(gen.decoder, context, 0, ids[:40])
            loop = DecodeLoop(gen.decoder, context)
            for length in range(41, 60):
                loop.step([ids[length - 1]], [length])
            logits = prefill(gen.decoder, context, 0, ids[59:], start=59)
            State(gen, context, logits, LENGTH).check(whole)


@pytest.mark.usefixtures("small")
@torch.no_grad()
def test_turns_of_one_sequence_leave_the_others_alone(tmp_path: Path) -> None:
    save_tiny(tmp_path, tiny_config("llama"))
    first, second = random_prompts(80, 50)
    with make(tmp_path) as gen:
        gen.generate(first[:20], max_new_tokens=1)
        assert gen._calibration is not None
        answers = []
        for turns in ([80], [30, 80]):
            with KVContext(gen.decoder, gen.config, gen._calibration, [80 + NEW, 50 + NEW]) as context:
                logits = prefill(gen.decoder, context, 0, first[: turns[0]])
                other = prefill(gen.decoder, context, 1, second)
                for start, stop in itertools.pairwise(turns):
                    logits = prefill(gen.decoder, context, 0, first[start:stop], start=start)
                loop = DecodeLoop(gen.decoder, context)
                tokens = [[int(logits.argmax()), int(other.argmax())]]
                for step in range(NEW):
                    out = loop.step(tokens[-1], [81 + step, 51 + step])
                    tokens.append(out.argmax(-1).tolist())
            answers.append(tokens)
    assert answers[0] == answers[1]


@pytest.mark.parametrize(("ids", "start"), [([], 0), ([1], -1)])
def test_wrong_arguments_are_refused(ids: list[int], start: int, tmp_path: Path) -> None:
    save_tiny(tmp_path, tiny_config("llama"))
    with make(tmp_path) as gen:
        gen.generate([1, 2, 3], max_new_tokens=1)
        assert gen._calibration is not None
        with (
            KVContext(gen.decoder, gen.config, gen._calibration, [9]) as context,
            pytest.raises(ValueError, match=f"{len(ids)} ids, start={start}"),
        ):
            prefill(gen.decoder, context, 0, ids, start=start)


@pytest.mark.usefixtures("small")
@torch.no_grad()
@pytest.mark.parametrize("streamed", [False, True])
def test_progress_grows_to_the_prompts_length(streamed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces the later ones are more work: they attend to more."""
    monkeypatch.setattr("ds_offload.prefill_pace.REPORT_EVERY_S", 0.0)
    save_tiny(tmp_path, tiny_config("llama", num_hidden_layers=1, hidden_size=32, intermediate_size=8))
    ids = random_prompts(148)[0]
    seen: list[tuple[str, int, int]] = []
    with make(tmp_path) as gen:
        gen.generate(ids[:20], max_new_tokens=1)
        assert gen._calibration is not None
        with KVContext(gen.decoder, gen.config, gen._calibration, [150]) as context:
            prefill(gen.decoder, context, 0, ids, lambda *event: seen.append(event), streamed=streamed)
    assert seen[0] == ("prefill", 0, 148) and seen[-1] == ("prefill", 148, 148)
    done = [event[1] for event in seen]
    assert done == sorted(set(done))
    if streamed:
        assert len(done) > 8 and done[-1] - done[-4] < 148 / 2


def _whole_and_others(folder: Path, **changes: Any) -> Iterator[tuple[State, State]]:
    ids = random_prompts(9000)[0]
    with make(folder, "cuda", max_context=10_000, segment_tokens=1024, token_budget=600, **changes) as gen:
        whole = run(gen, ids, [])
        slow = Faults(delay={"stored": 50_000_000, "prompt_rows": 50_000_000})
        for turns, streamed, faults in (([5000], False, None), ([4100, 4101], True, None), ([], True, slow)):
            yield run(gen, ids, turns, streamed, faults), whole


@pytest.mark.gpu
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("changes", [{}, {"dense_layers": (1,)}, {"kv_location": "gpu"}])
def test_on_a_gpu_in_float32(kv_heads: int, changes: dict[str, Any], tmp_path: Path, monkeypatch: Any) -> None:
    """The memory-efficient kernel, and its log-sum-exp, which is padded."""
    monkeypatch.setattr(ds_offload.prefill, "piece_tokens", lambda heads, head_dim: 4097)
    monkeypatch.setattr(ds_offload.stored_blocks, "stream_tokens", lambda kv_heads, row_bytes: 1500)
    save_tiny(tmp_path, tiny_config("llama", kv_heads))
    for other, whole in _whole_and_others(tmp_path, **changes):
        torch.testing.assert_close(other.logits, whole.logits, rtol=1e-2, atol=1e-2)
        for mine, others in zip(other.rows, whole.rows, strict=True):
            torch.testing.assert_close(mine, others, rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_on_a_gpu_in_bf16(kv_heads: int, head_dim: int, tmp_path: Path, monkeypatch: Any) -> None:
    """cuDNN's kernel for pieces of 4,096 tokens and more, FlashAttention's for shorter ones."""
    monkeypatch.setattr(ds_offload.prefill, "piece_tokens", lambda heads, head_dim: 4097)
    monkeypatch.setattr(ds_offload.stored_blocks, "stream_tokens", lambda kv_heads, row_bytes: 1500)
    save_tiny(tmp_path, tiny_config("llama", kv_heads, head_dim=head_dim, initializer_range=0.05), torch.bfloat16)
    for other, whole in _whole_and_others(tmp_path):
        assert (other.logits - whole.logits).norm() / whole.logits.norm() < 3e-2
        for mine, others in zip(other.rows, whole.rows, strict=True):
            assert (mine - others).norm() / others.norm() < 3e-2
