"""Turns over quantised rows, whose window cannot be filled from the store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from session_case import DOCUMENT, QUESTIONS, ask, assert_same_cache, cache_of, make

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


@pytest.mark.parametrize("case", QUANTISED)
def test_many_questions_over_quantised_rows(case: str, tiny_llama: Path) -> None:
    """Each answer has the bits of a session that was asked nothing before, and the document stays as it was read."""
    with make(tiny_llama, **QUANTISED[case]) as gen:
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
def test_quantised_answers_are_near_those_of_a_fresh_prefill(kv_dtype: str, near: float, tiny_llama: Path) -> None:
    """The question reads the document as it is stored; a prefill of both together reads it as it is."""
    changes = {"token_budget": "1/1", "prefetch": "off", "kv_dtype": kv_dtype}
    with make(tiny_llama, **changes) as gen, make(tiny_llama, token_budget="1/1") as plain:
        for question in QUESTIONS:
            with gen.prefill(DOCUMENT) as session:
                out = session.ask(question, max_new_tokens=1, output_logits=True)
            together = plain.generate(DOCUMENT + question, max_new_tokens=1, output_logits=True)
            error = (out.logits - together.logits).norm() / together.logits.norm()
            assert 0 < error < near


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("common", [100, 149, 4, 1])
def test_a_question_that_changes_the_last_tokens_of_quantised_rows(
    common: int, kept: bool, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The window of the tokens before is read again, once: what it was lies in the store quantised only."""
    changed = [*DOCUMENT[:common], *QUESTIONS[1]]
    # A window that is longer than the question shows what it holds.
    with make(tiny_llama, kv_dtype="int8", token_budget="1/1", recent_tokens=30) as gen:
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


def test_reading_the_window_again_is_interrupted(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was being written is read again with the next question, or before the session is saved."""
    with make(tiny_llama, kv_dtype="int8", token_budget="1/1") as gen, gen.prefill(DOCUMENT) as session:
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


def test_a_checkpoint_of_a_quantised_document(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(phase: str, done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("ds_offload.prefill_checkpoint.EVERY_S", 0.0)
    with make(tiny_llama, kv_dtype="int4") as gen:
        with gen.prefill(DOCUMENT) as session:
            before, expected = cache_of(session), ask(session, QUESTIONS[0])
        with pytest.raises(KeyboardInterrupt):
            gen.prefill(DOCUMENT, checkpoint=tmp_path, on_progress=stop)
        assert list(tmp_path.glob("window-*"))
        with gen.prefill(DOCUMENT, checkpoint=tmp_path) as session:
            assert_same_cache(cache_of(session), before)
            assert torch.equal(ask(session, QUESTIONS[0]).logits, expected.logits)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "changes",
    [{"kv_dtype": "int8"}, {"kv_dtype": "int4", "prefetch": "exact"}, {"kv_dtype": "int4", "kv_location": "gpu"}],
)
def test_quantised_rows_on_a_gpu(changes: dict[str, Any], tiny_llama: Path) -> None:
    with make(tiny_llama, "cuda", **changes) as gen:
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
