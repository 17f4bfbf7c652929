"""Documents that stay read: every answer is that of a fresh prefill, whatever was asked before."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import random_prompts, save_tiny, tiny_config

import ds_offload.conversation
from ds_offload import InputError, OffloadConfig, OffloadedGenerator
from ds_offload.errors import MemoryPlanError
from ds_offload.session import Session

NEW = 14
DOCUMENT = random_prompts(150)[0]
QUESTIONS = [random_prompts(length, seed=length)[0] for length in (9, 1, 40)]
CASES: dict[str, dict[str, Any]] = {
    "sparse": {},
    "exact": {"prefetch": "exact"},
    "speculative": {"prefetch": "speculative"},
    "hot set of 1": {"hot_set": 1},
    "nothing kept": {"hot_set": 0},
    "store on the device": {"kv_location": "gpu"},
    "dense layer": {"dense_layers": (1,)},
    "all dense": {"dense_layers": (0, 1, 2)},
    "no sinks": {"sink_tokens": 0},
    "long window": {"sink_tokens": 70, "recent_tokens": 90, "token_budget": 200},
    "one segment": {"segment_tokens": 1024},
    "top-p": {"token_budget": "top-p:0.8"},
}
# K/V whose rows are read back quantised: the window cannot be filled from the store.
QUANTISED: dict[str, dict[str, Any]] = {
    "int8": {"kv_dtype": "int8"},
    "int4": {"kv_dtype": "int4"},
    "exact": {"kv_dtype": "int4", "prefetch": "exact"},
    "store on the device": {"kv_dtype": "int8", "kv_location": "gpu"},
    "dense layer": {"kv_dtype": "int4", "dense_layers": (1,)},
    "no sinks": {"kv_dtype": "int8", "sink_tokens": 0},
    "long window": {"kv_dtype": "int4", "sink_tokens": 70, "recent_tokens": 90, "token_budget": 200},
    "window of the whole": {"kv_dtype": "int4", "recent_tokens": 399, "token_budget": "1/1"},
}


def make(model: Path, device: str = "cpu", **changes: Any) -> OffloadedGenerator:
    config = {"max_context": 400, "sink_tokens": 2, "recent_tokens": 4, "token_budget": 24, "segment_tokens": 16}
    return OffloadedGenerator.from_pretrained(str(model), config=OffloadConfig(**config | changes), device=device)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_tiny(folder, tiny_config("llama"))
    return folder


@pytest.fixture
def gen(model: Path) -> Iterator[OffloadedGenerator]:
    with make(model) as generator:
        yield generator


def ask(session: Session, question: list[int], **options: Any) -> Any:
    return session.ask(question, max_new_tokens=NEW, output_logits=True, **options)


@pytest.mark.parametrize("case", CASES)
def test_many_questions_over_one_document(case: str, model: Path) -> None:
    """Each answer has the bits that a session gives which was asked nothing before, and `generate`'s tokens."""
    with make(model, **CASES[case]) as gen:
        fresh = []
        for question in QUESTIONS:
            with gen.prefill(DOCUMENT) as session:
                fresh.append(ask(session, question, keep=False))
        with gen.prefill(DOCUMENT) as session:
            for number in (0, 1, 2, 1, 0):
                out = ask(session, QUESTIONS[number], keep=False)
                assert torch.equal(out.logits, fresh[number].logits)
                assert out.prompt_tokens == 150 + len(QUESTIONS[number])
                assert out.stats["prefilled_tokens"] == len(QUESTIONS[number])
                assert session.token_ids == DOCUMENT and session.stored == 150
        for question, out in zip(QUESTIONS, fresh, strict=True):
            assert gen.generate(DOCUMENT + question, max_new_tokens=NEW).token_ids == out.token_ids


@pytest.mark.parametrize("family", ["mixtral", "qwen2", "qwen3"])
def test_of_other_families(family: str, tmp_path: Path) -> None:
    save_tiny(tmp_path, tiny_config(family))
    with make(tmp_path) as gen, gen.prefill(DOCUMENT) as session:
        for question in QUESTIONS:
            expected = gen.generate(DOCUMENT + question, max_new_tokens=NEW).token_ids
            assert ask(session, question, keep=False).token_ids == expected


def cache_of(session: Session) -> list[torch.Tensor]:
    """All that a session keeps of its tokens: stored rows, labels and, where rows are quantised, the window."""
    context, tokens = session._conversation.context, session.stored
    parts = [part.clone() for layer in range(3) for part in context.row_parts(layer, 0, tokens)]
    parts += [context.labels.rows[:, :, :tokens].clone()]
    if context.codec is not None and context.window_buffer is not None:
        sinks, ring = context.window.sinks, context.window.ring
        held = [*range(min(sinks, tokens)), *range(max(sinks, tokens - ring), tokens)]
        slots = context.window_buffer.places(torch.tensor([held]))[0]
        parts += [rows[:, :, slots] for rows in context.window_buffer.copy().values()]
    return parts


def assert_same_cache(first: list[torch.Tensor], second: list[torch.Tensor]) -> None:
    assert len(first) == len(second) > 3
    for mine, other in zip(first, second, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("case", QUANTISED)
def test_many_questions_over_quantised_rows(case: str, model: Path) -> None:
    """Each answer has the bits of a session that was asked nothing before, and the document stays as it was read."""
    with make(model, **QUANTISED[case]) as gen:
        fresh = []
        for question in QUESTIONS:
            with gen.prefill(DOCUMENT) as session:
                fresh.append(ask(session, question, keep=False))
        with gen.prefill(DOCUMENT) as session:
            before = cache_of(session)
            for number in (0, 1, 2, 1, 0):
                out = ask(session, QUESTIONS[number], keep=False)
                assert torch.equal(out.logits, fresh[number].logits)
                assert out.stats["prefilled_tokens"] == len(QUESTIONS[number])
                assert_same_cache(cache_of(session), before)
            with session.fork() as fork:
                first = ask(session, QUESTIONS[0])
                second = ask(session, QUESTIONS[2])
                assert torch.equal(first.logits, fresh[0].logits)
                assert torch.equal(ask(fork, QUESTIONS[0]).logits, first.logits)
                session.close()
                assert torch.equal(ask(fork, QUESTIONS[2]).logits, second.logits)


@pytest.mark.parametrize(("kv_dtype", "near"), [("int8", 0.03), ("int4", 0.4)])
def test_quantised_answers_are_near_those_of_a_fresh_prefill(kv_dtype: str, near: float, model: Path) -> None:
    """The question reads the document as it is stored; a prefill of both together reads it as it is."""
    changes = {"token_budget": "1/1", "prefetch": "off", "kv_dtype": kv_dtype}
    with make(model, **changes) as gen, make(model, token_budget="1/1") as plain:
        for question in QUESTIONS:
            with gen.prefill(DOCUMENT) as session:
                out = session.ask(question, max_new_tokens=1, output_logits=True)
            together = plain.generate(DOCUMENT + question, max_new_tokens=1, output_logits=True)
            error = (out.logits - together.logits).norm() / together.logits.norm()
            assert 0 < error < near


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("common", [100, 149, 4, 1])
def test_a_question_that_changes_the_last_tokens_of_quantised_rows(
    common: int, kept: bool, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The window of the tokens before is read again, once: what it was lies in the store quantised only."""
    changed = [*DOCUMENT[:common], *QUESTIONS[1]]
    # A window that is longer than the question shows what it holds.
    with make(model, kv_dtype="int8", token_budget="1/1", recent_tokens=30) as gen:
        with gen.prefill(DOCUMENT[:common]) as session:
            expected = session.ask(QUESTIONS[1], max_new_tokens=3, output_logits=True)
        with gen.prefill(DOCUMENT) as session:
            with monkeypatch.context() as patch:
                patch.setattr("ds_offload.session.conversation_ids", lambda *_: changed)
                out = session.ask([], max_new_tokens=3, keep=kept, output_logits=True)
            torch.testing.assert_close(out.logits, expected.logits, rtol=0.05, atol=0.05)
            if kept:
                assert session.token_ids == changed + out.token_ids
                return
            assert session.token_ids == DOCUMENT and session.stored == common
            with session.fork() as fork:
                first = ask(session, QUESTIONS[0], keep=False)
                assert first.stats["prefilled_tokens"] == 150 - common + len(QUESTIONS[0])
                assert torch.equal(ask(fork, QUESTIONS[0]).logits, first.logits)
            assert torch.equal(ask(session, QUESTIONS[0]).logits, first.logits)


def test_reading_the_window_again_is_interrupted(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was being written is read again with the next question, or before the session is saved."""
    with make(model, kv_dtype="int8", token_budget="1/1") as gen, gen.prefill(DOCUMENT) as session:
        expected = ask(session, QUESTIONS[0], keep=False)
        session._conversation.forget(90)
        with monkeypatch.context() as patch:
            patch.setattr(session._conversation, "_extend", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                session.fork()
        assert session.stored == 90 - 5
        with session.fork() as fork:
            assert fork.stored == 85
            out = ask(fork, QUESTIONS[0])
        torch.testing.assert_close(out.logits[0], expected.logits[0], rtol=0.05, atol=0.05)
        assert torch.equal(ask(session, QUESTIONS[0]).logits, out.logits)


def test_a_checkpoint_of_a_quantised_document(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(phase: str, done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("ds_offload.prefill_checkpoint.EVERY_S", 0.0)
    with make(model, kv_dtype="int4") as gen:
        with gen.prefill(DOCUMENT) as session:
            before, expected = cache_of(session), ask(session, QUESTIONS[0])
        with pytest.raises(KeyboardInterrupt):
            gen.prefill(DOCUMENT, checkpoint=tmp_path, on_progress=stop)
        assert list(tmp_path.glob("window-*"))
        with gen.prefill(DOCUMENT, checkpoint=tmp_path) as session:
            assert_same_cache(cache_of(session), before)
            assert torch.equal(ask(session, QUESTIONS[0]).logits, expected.logits)


def test_a_conversation_equals_a_fresh_prefill_of_all_of_it(model: Path) -> None:
    """With the whole context attended to, so that decode steps leave the K/V that a prefill does."""
    with make(model, token_budget="1/1") as gen, gen.prefill(DOCUMENT) as session:
        ids = DOCUMENT
        for question in QUESTIONS:
            out = ask(session, question)
            ids = ids + question
            expected = gen.generate(ids, max_new_tokens=NEW, output_logits=True)
            assert out.token_ids == expected.token_ids
            torch.testing.assert_close(out.logits, expected.logits, rtol=1e-3, atol=1e-3)
            ids = ids + out.token_ids
            assert session.token_ids == ids
        # The last token of an answer is read with the next question.
        assert session.stored == len(ids) - 1
        assert out.stats["prefilled_tokens"] == 1 + len(QUESTIONS[-1])


def test_a_forgotten_question_leaves_the_conversation(model: Path, gen: OffloadedGenerator) -> None:
    with gen.prefill(DOCUMENT) as session, gen.prefill(DOCUMENT) as other:
        assert ask(session, QUESTIONS[0]).token_ids == ask(other, QUESTIONS[0]).token_ids
        ask(session, QUESTIONS[2], keep=False)
        assert session.token_ids == other.token_ids and session.stored == other.stored
        assert torch.equal(ask(session, QUESTIONS[1]).logits, ask(other, QUESTIONS[1]).logits)


def test_long_turns_are_streamed(gen: OffloadedGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ds_offload.conversation, "piece_tokens", lambda heads, head_dim: 16)
    monkeypatch.setattr("ds_offload.prefill.piece_tokens", lambda heads, head_dim: 16)
    question = random_prompts(100, seed=9)[0]
    with gen.prefill(DOCUMENT[:7]) as session:
        expected = gen.generate(DOCUMENT[:7] + question, max_new_tokens=NEW)
        assert ask(session, question, keep=False).token_ids == expected.token_ids


def test_forks_go_their_own_ways(gen: OffloadedGenerator) -> None:
    with gen.prefill(DOCUMENT) as fresh:
        expected = [ask(fresh, question, keep=False) for question in QUESTIONS]
        first = ask(fresh, QUESTIONS[0])
        then = ask(fresh, QUESTIONS[2])
    session = gen.prefill(DOCUMENT)
    forks = [session.fork() for _ in range(2)]
    # 150 tokens are 9 whole segments of 16, and a tenth that each has for itself.
    shared = [fork._conversation.context.store.table.tensors[0][8].data_ptr() for fork in [session, *forks]]
    tails = [fork._conversation.context.store.table.tensors[0][9].data_ptr() for fork in [session, *forks]]
    assert len(set(shared)) == 1 and len(set(tails)) == 3
    assert torch.equal(ask(forks[0], QUESTIONS[0]).logits, first.logits)
    assert torch.equal(ask(session, QUESTIONS[2], keep=False).logits, expected[2].logits)
    again = forks[0].fork()
    forks[0].close()
    session.close()
    gc.collect()
    assert torch.equal(ask(forks[1], QUESTIONS[1]).logits, expected[1].logits)
    assert torch.equal(ask(again, QUESTIONS[2]).logits, then.logits)
    for fork in (forks[1], again):
        fork.close()


def test_a_fork_of_the_whole_keeps_dense_layers_and_device_stores(model: Path) -> None:
    for changes in ({"dense_layers": (0,)}, {"kv_location": "gpu"}, {"prefetch": "exact", "hot_set": 1}):
        with make(model, **changes) as gen, gen.prefill(DOCUMENT) as session, session.fork() as fork:
            mine = ask(session, QUESTIONS[0])
            assert torch.equal(ask(fork, QUESTIONS[0]).logits, mine.logits)


def test_shared_segments_are_copied_before_they_are_written(
    gen: OffloadedGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A question that changes the document's last tokens writes into segments that a fork shares."""
    with gen.prefill(DOCUMENT) as session, session.fork() as fork:
        expected = ask(session, QUESTIONS[0], keep=False)
        changed = [*DOCUMENT[:100], *QUESTIONS[2]]
        with monkeypatch.context() as patch:
            patch.setattr("ds_offload.session.conversation_ids", lambda *_: changed)
            answer = ask(fork, [])
        assert answer.token_ids == gen.generate(changed, max_new_tokens=NEW).token_ids
        assert torch.equal(ask(session, QUESTIONS[0], keep=False).logits, expected.logits)


def test_a_stream_gives_the_answer_in_pieces(gen: OffloadedGenerator) -> None:
    with gen.prefill(DOCUMENT) as session:
        expected = session.ask(QUESTIONS[0], keep=False, max_new_tokens=NEW)
        pieces = list(session.stream(QUESTIONS[0], max_new_tokens=NEW))
        assert "".join(pieces) == expected.text and len(pieces) > 1
        assert session.last_output is not None and session.last_output.token_ids == expected.token_ids
        assert session.token_ids == DOCUMENT + QUESTIONS[0] + expected.token_ids


@pytest.mark.parametrize("keep", [True, False])
def test_a_stream_closed_early(gen: OffloadedGenerator, keep: bool) -> None:
    with gen.prefill(DOCUMENT) as session, gen.prefill(DOCUMENT) as other:
        whole = ask(other, QUESTIONS[0], keep=False)
        stream = session.stream(QUESTIONS[0], keep=keep, max_new_tokens=NEW)
        for _ in range(3):
            next(stream)
        with pytest.raises(InputError, match="still answering"):
            session.ask(QUESTIONS[1])
        with pytest.raises(InputError, match="still answering"):
            session.fork()
        stream.close()
        said = DOCUMENT + QUESTIONS[0] + whole.token_ids[:3] if keep else DOCUMENT
        assert session.token_ids == said
        if not keep:
            assert torch.equal(ask(session, QUESTIONS[1]).logits, ask(other, QUESTIONS[1]).logits)


def test_a_prefill_that_is_interrupted_is_taken_back(gen: OffloadedGenerator) -> None:
    def stop(phase: str, done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with gen.prefill(DOCUMENT) as session:
        expected = ask(session, QUESTIONS[0], keep=False)
        with pytest.raises(KeyboardInterrupt):
            session.ask(QUESTIONS[2], on_progress=stop)
        assert session.token_ids == DOCUMENT
        assert torch.equal(ask(session, QUESTIONS[0]).logits, expected.logits)


def test_a_stream_that_the_session_has_left_behind(gen: OffloadedGenerator) -> None:
    with gen.prefill(DOCUMENT) as session:
        stream = session.stream(QUESTIONS[0], max_new_tokens=2)
        session.ask(QUESTIONS[1], max_new_tokens=2)
        with pytest.raises(InputError, match="went on"):
            next(stream)


def test_statistics_are_of_one_answer(gen: OffloadedGenerator) -> None:
    with gen.prefill(DOCUMENT) as session:
        stats = [ask(session, QUESTIONS[0], keep=False).stats for _ in range(3)]
    assert stats[0]["h2d_bytes_per_token"] == stats[1]["h2d_bytes_per_token"] == stats[2]["h2d_bytes_per_token"] > 0
    assert {"prefill_s", "decode_ms_per_token", "layers", "host_kv_bytes", "prefilled_tokens"} <= set(stats[0])


def test_what_cannot_be_asked(gen: OffloadedGenerator) -> None:
    session = gen.prefill(DOCUMENT)
    refusals: list[tuple[Any, dict[str, Any], str]] = [
        ([], {}, "empty list"),
        ([301], {}, "token id 301"),
        ("text", {}, "no tokenizer"),
        (random_prompts(250)[0], {}, "400 tokens and max_context=400"),
        (QUESTIONS[0], {"temperature": -1}, "temperature"),
    ]
    for question, options, message in refusals:
        with pytest.raises(InputError, match=message) as error:
            session.ask(question, **options)
        assert "\n" not in str(error.value)
    assert len(session.ask(random_prompts(245)[0], max_new_tokens=64).token_ids) == 5
    session.close()
    session.close()
    for call in (lambda: session.ask(QUESTIONS[0]), session.fork, lambda: session.save("x")):
        with pytest.raises(InputError, match="closed"):
            call()


@pytest.mark.parametrize(
    "document", ["", "text without tokenizer", [], [301], ["a", "b"], [[1]], [{"role": "user"}], 5]
)
def test_what_is_no_document(gen: OffloadedGenerator, document: Any) -> None:
    with pytest.raises(InputError) as error:
        gen.prefill(document)
    assert "\n" not in str(error.value)


def test_a_document_that_fills_the_context(gen: OffloadedGenerator) -> None:
    with pytest.raises(InputError, match="the document has 400 tokens and max_context=400"):
        gen.prefill(random_prompts(400)[0])


def test_room_for_all_of_max_context_is_planned(model: Path) -> None:
    with make(model, max_context=100_000, host_memory="40MiB") as gen:
        assert len(gen.generate(DOCUMENT, max_new_tokens=2).token_ids) == 2
        with pytest.raises(MemoryPlanError, match="100,000 tokens need"):
            gen.prefill(DOCUMENT)


def test_nothing_is_held_behind_the_last_session(gen: OffloadedGenerator) -> None:
    session = gen.prefill(DOCUMENT)
    pool = session._conversation.context._pool
    fork = session.fork()
    blocks = list(fork._conversation.context._pool._blocks.values())
    assert pool.nbytes > 0
    session.close()
    assert pool.nbytes == 0 and all(block.holders == 1 for block in blocks)
    del fork
    gc.collect()
    assert all(block.holders == 0 for block in blocks)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "changes",
    [{"kv_dtype": "int8"}, {"kv_dtype": "int4", "prefetch": "exact"}, {"kv_dtype": "int4", "kv_location": "gpu"}],
)
def test_quantised_rows_on_a_gpu(changes: dict[str, Any], model: Path) -> None:
    with make(model, "cuda", **changes) as gen:
        fresh = []
        for question in QUESTIONS:
            with gen.prefill(DOCUMENT) as session:
                fresh.append(ask(session, question, keep=False))
        with gen.prefill(DOCUMENT) as session:
            before = cache_of(session)
            for number in (0, 1, 2, 1, 0):
                assert ask(session, QUESTIONS[number], keep=False).token_ids == fresh[number].token_ids
                torch.cuda.synchronize()
                assert_same_cache(cache_of(session), before)
            with session.fork() as fork:
                kept = ask(session, QUESTIONS[0])
                session.close()
                assert kept.token_ids == ask(fork, QUESTIONS[0]).token_ids == fresh[0].token_ids


@pytest.mark.gpu
@pytest.mark.parametrize("changes", [{}, {"prefetch": "exact"}, {"prefetch": "speculative"}, {"kv_location": "gpu"}])
def test_on_a_gpu(changes: dict[str, Any], model: Path) -> None:
    with make(model, "cuda", **changes) as gen:
        fresh = []
        for question in QUESTIONS:
            with gen.prefill(DOCUMENT) as session:
                fresh.append(ask(session, question, keep=False))
            assert gen.generate(DOCUMENT + question, max_new_tokens=NEW).token_ids == fresh[-1].token_ids
        with gen.prefill(DOCUMENT) as session:
            outs = [ask(session, QUESTIONS[number], keep=False) for number in (0, 1, 2, 1, 0)]
            for out, number in zip(outs, (0, 1, 2, 1, 0), strict=True):
                assert out.token_ids == fresh[number].token_ids
            # One graph serves them all.
            assert outs[0].stats["graph_capture_s"] > 0
            assert all(out.stats["graph_capture_s"] is None for out in outs[1:])
            with session.fork() as fork:
                kept = ask(session, QUESTIONS[0])
                assert kept.token_ids == ask(fork, QUESTIONS[0]).token_ids == fresh[0].token_ids
                session.close()
                assert ask(fork, QUESTIONS[1]).stats["prefilled_tokens"] == 2


@pytest.mark.gpu
def test_pinned_memory_goes_back(model: Path) -> None:
    with make(model, "cuda") as gen:
        gen.generate(DOCUMENT, max_new_tokens=4)
        before = torch.cuda.memory_allocated()
        session = gen.prefill(DOCUMENT)
        ask(session, QUESTIONS[0])
        fork = session.fork()
        session.close()
        assert fork._conversation.context.pinned_bytes > 0
        ask(fork, QUESTIONS[1])
        fork.close()
        assert fork._conversation.context.pinned_bytes == 0
        del session, fork
        gc.collect()
        assert torch.cuda.memory_allocated() == before
