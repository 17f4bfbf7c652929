"""Turns that were kept and are taken back: the next answer is that of a conversation which never had them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from session_case import DOCUMENT, NEW, QUESTIONS, ask, make

from ds_offload import InputError

CASES: dict[str, dict[str, Any]] = {
    "off": {},
    "exact": {"prefetch": "exact"},
    "speculative": {"prefetch": "speculative"},
    "hot set of 1": {"hot_set": 1},
    "dense layer": {"dense_layers": (1,)},
    "store on the device": {"kv_location": "gpu"},
}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES)
def test_the_next_answer_is_that_of_a_question_that_was_not_kept(case: str, device: str, tiny_llama: Path) -> None:
    with (
        make(tiny_llama, device, **CASES[case]) as gen,
        gen.prefill(DOCUMENT) as session,
        gen.prefill(DOCUMENT) as other,
    ):
        for one in (session, other):
            ask(one, QUESTIONS[0])
        said, stored = list(session.token_ids), session.stored
        ask(session, QUESTIONS[2])
        ask(other, QUESTIONS[2], keep=False)
        session.undo()
        assert (session.token_ids, session.stored, session.last_output) == (said, stored, None)
        assert torch.equal(ask(session, QUESTIONS[1]).logits, ask(other, QUESTIONS[1]).logits)
        session.undo()
        session.undo()
        assert session.token_ids == DOCUMENT and session.stored == len(DOCUMENT)
        with gen.prefill(DOCUMENT) as fresh:
            assert torch.equal(ask(session, QUESTIONS[2]).logits, ask(fresh, QUESTIONS[2]).logits)


@pytest.mark.parametrize("kv_dtype", ["int8", "int4"])
def test_quantised_rows(kv_dtype: str, tiny_llama: Path) -> None:
    """The recent tokens are read again, as behind an interruption: both give the same bits."""
    with make(tiny_llama, kv_dtype=kv_dtype) as gen, gen.prefill(DOCUMENT) as session, session.fork() as other:
        session.ask(QUESTIONS[0], max_new_tokens=NEW)
        session.undo()
        assert session.token_ids == DOCUMENT
        other._conversation.forget(len(DOCUMENT))
        assert torch.equal(ask(session, QUESTIONS[2]).logits, ask(other, QUESTIONS[2]).logits)


@pytest.mark.parametrize("taken", [1, 3])
def test_a_turn_that_was_closed_early(taken: int, tiny_llama: Path) -> None:
    with make(tiny_llama) as gen, gen.prefill(DOCUMENT) as session, gen.prefill(DOCUMENT) as other:
        for one in (session, other):
            ask(one, QUESTIONS[1])
        stream = session.stream(QUESTIONS[0], max_new_tokens=NEW)
        for _ in range(taken):
            next(stream)
        with pytest.raises(InputError, match="still answering"):
            session.undo()
        stream.close()
        session.undo()
        assert torch.equal(ask(session, QUESTIONS[2]).logits, ask(other, QUESTIONS[2]).logits)


def test_a_turn_that_failed_in_a_step(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(phase: str, done: int, total: int) -> None:
        if phase == "decode" and done == 4:
            raise KeyboardInterrupt

    with make(tiny_llama) as gen, gen.prefill(DOCUMENT) as session, gen.prefill(DOCUMENT) as fresh:
        with pytest.raises(KeyboardInterrupt):
            session.ask(QUESTIONS[0], on_progress=stop, max_new_tokens=NEW)
        assert len(session.token_ids) > len(DOCUMENT)
        session.undo()
        assert torch.equal(ask(session, QUESTIONS[2]).logits, ask(fresh, QUESTIONS[2]).logits)


def test_a_question_that_changed_the_documents_last_tokens(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with make(tiny_llama) as gen, gen.prefill(DOCUMENT) as session, gen.prefill(DOCUMENT) as fresh:
        changed = [*DOCUMENT[:100], *QUESTIONS[2]]
        with monkeypatch.context() as patch:
            patch.setattr("ds_offload.session.conversation_ids", lambda *_: changed)
            ask(session, [])
        common = next(n for n, pair in enumerate(zip(DOCUMENT, changed, strict=False)) if pair[0] != pair[1])
        session.undo()
        assert session.token_ids == DOCUMENT and session.stored == common < len(DOCUMENT)
        answer = ask(session, QUESTIONS[0])
        assert answer.token_ids == ask(fresh, QUESTIONS[0]).token_ids
        assert answer.stats["prefilled_tokens"] == len(DOCUMENT) - common + len(QUESTIONS[0])


def test_a_budget_that_the_turn_widened_goes_back(tiny_llama: Path) -> None:
    with make(tiny_llama, monitor="widen", monitor_every=1) as gen, gen.prefill(DOCUMENT) as session:
        before = session._conversation.context.budget_state
        session.ask(QUESTIONS[0], max_new_tokens=30)
        assert session._conversation.context.budget_state != before
        session.undo()
        assert session._conversation.context.budget_state == before


def test_a_fork_takes_back_what_both_share(tiny_llama: Path, tmp_path: Path) -> None:
    with make(tiny_llama) as gen, gen.prefill(DOCUMENT) as session:
        with pytest.raises(InputError, match="nothing to undo"):
            session.undo()
        expected = ask(session, QUESTIONS[2], keep=False)
        ask(session, QUESTIONS[0])
        with session.fork() as fork:
            fork.undo()
            assert torch.equal(ask(fork, QUESTIONS[2]).logits, expected.logits)
            assert len(session.token_ids) == len(DOCUMENT) + len(QUESTIONS[0]) + NEW
        ask(session, QUESTIONS[1], keep=False)
        session.undo()
        assert session.token_ids == DOCUMENT
        with pytest.raises(InputError, match="nothing to undo"):
            session.undo()
        ask(session, QUESTIONS[0])
        session.save(tmp_path / "book")
        with gen.load_session(tmp_path / "book") as loaded, pytest.raises(InputError, match="nothing to undo"):
            loaded.undo()
