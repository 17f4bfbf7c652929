"""Turns about a document: every answer is that of a fresh prefill, whatever was asked before."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from session_case import DOCUMENT, NEW, QUESTIONS, ask, make
from tiny_models import random_prompts, save_tiny, tiny_config

import ds_offload.conversation
from ds_offload import OffloadedGenerator

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


@pytest.fixture
def gen(tiny_llama: Path) -> Iterator[OffloadedGenerator]:
    with make(tiny_llama) as generator:
        yield generator


@pytest.mark.parametrize("case", CASES)
def test_many_questions_over_one_document(case: str, tiny_llama: Path) -> None:
    """Each answer has the bits that a session gives which was asked nothing before, and `generate`'s tokens."""
    with make(tiny_llama, **CASES[case]) as gen:
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


def test_a_conversation_equals_a_fresh_prefill_of_all_of_it(tiny_llama: Path) -> None:
    """With the whole context attended to, so that decode steps leave the K/V that a prefill does."""
    with make(tiny_llama, token_budget="1/1") as gen, gen.prefill(DOCUMENT) as session:
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


def test_a_forgotten_question_leaves_the_conversation(tiny_llama: Path, gen: OffloadedGenerator) -> None:
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


def test_statistics_are_of_one_answer(gen: OffloadedGenerator) -> None:
    with gen.prefill(DOCUMENT) as session:
        stats = [ask(session, QUESTIONS[0], keep=False).stats for _ in range(3)]
    assert stats[0]["h2d_bytes_per_token"] == stats[1]["h2d_bytes_per_token"] == stats[2]["h2d_bytes_per_token"] > 0
    assert {"prefill_s", "decode_ms_per_token", "layers", "host_kv_bytes", "prefilled_tokens"} <= set(stats[0])


@pytest.mark.gpu
@pytest.mark.parametrize("changes", [{}, {"prefetch": "exact"}, {"prefetch": "speculative"}, {"kv_location": "gpu"}])
def test_on_a_gpu(changes: dict[str, Any], tiny_llama: Path) -> None:
    with make(tiny_llama, "cuda", **changes) as gen:
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


def test_a_question_that_is_forgotten_widens_nothing(tiny_llama: Path) -> None:
    """Its monitor raised the budget; the next answer is that of a session without it, and says its own budget."""
    with make(tiny_llama, monitor="widen", monitor_every=1) as gen, gen.prefill(DOCUMENT) as session:
        with gen.prefill(DOCUMENT) as fresh:
            expected = ask(fresh, QUESTIONS[2], keep=False)
        forgotten = session.ask(QUESTIONS[0], max_new_tokens=30, keep=False)
        assert forgotten.stats["monitor"]["token_budget"] == "48"
        assert torch.equal(ask(session, QUESTIONS[2], keep=False).logits, expected.logits)
        session.ask(QUESTIONS[0], max_new_tokens=30)
        with session.fork() as fork:
            for one in (session, fork):
                assert ask(one, QUESTIONS[1], keep=False).stats["monitor"]["token_budget"] == "48"
