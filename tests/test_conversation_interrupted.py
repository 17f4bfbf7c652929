"""An answer that an error or Ctrl-C ends in the middle of a step: what was said stays, what the step left does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from session_case import DOCUMENT, QUESTIONS, ask, make

import ds_offload.conversation
import ds_offload.kv_context
from ds_offload import InputError
from ds_offload.conversation import Conversation

CASES: dict[str, dict[str, Any]] = {
    "off": {},
    "exact": {"prefetch": "exact"},
    "hot set of 1": {"hot_set": 1},
    "int8": {"kv_dtype": "int8"},
    "int4, exact": {"kv_dtype": "int4", "prefetch": "exact"},
    "store on the device": {"kv_location": "gpu"},
}


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("calls", [1, 5, 12])
@pytest.mark.parametrize("case", CASES)
def test_the_next_answer_is_that_of_an_empty_hot_set(
    case: str, calls: int, keep: bool, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slots count as filled before their rows are there: attention, which fetches them, is where it ends."""
    names = [name for name in ("slot_attention", "coded_attention") if hasattr(ds_offload.kv_context, name)]
    left = 10**9

    def interrupted(attention: Any) -> Any:
        def attend(*args: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
            return attention(*args, **options)

        return attend

    with make(tiny_llama, monitor="off", **CASES[case]) as gen, gen.prefill(DOCUMENT) as session:
        ask(session, QUESTIONS[1])
        before = list(session.token_ids)
        for name in names:
            monkeypatch.setattr(ds_offload.kv_context, name, interrupted(getattr(ds_offload.kv_context, name)))
        left = calls
        with pytest.raises(KeyboardInterrupt):
            ask(session, QUESTIONS[0], keep=keep)
        left = 10**9
        assert (session.token_ids == before) != keep
        with session.fork() as fork:
            hot_set = fork._conversation.context.hot_set
            if hot_set is not None:
                hot_set.forget()
            expected = ask(fork, QUESTIONS[2])
        assert torch.equal(ask(session, QUESTIONS[2]).logits, expected.logits)


def test_a_stream_of_a_closed_session_says_so(tiny_llama: Path) -> None:
    with make(tiny_llama) as gen:
        for taken in (1, 2):
            session = gen.prefill(DOCUMENT)
            stream = session.stream(QUESTIONS[0], max_new_tokens=9)
            for _ in range(taken):
                next(stream)
            session.close()
            with pytest.raises(InputError, match="the session is closed"):
                next(stream)


@pytest.mark.parametrize("kv_dtype", ["fp32", "int8"])
@pytest.mark.parametrize("where", ["forget", "rewind"])
def test_interrupted_again_while_a_question_is_forgotten(
    where: str, kv_dtype: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second Ctrl-C comes before anything is taken back, or before the slots are emptied."""

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    changes: dict[str, Any] = {"monitor": "off", "kv_dtype": kv_dtype}
    with make(tiny_llama, **changes) as gen, gen.prefill(DOCUMENT) as session:
        expected = ask(session, QUESTIONS[2], keep=False)
        place: Any = Conversation if where == "forget" else ds_offload.conversation
        with monkeypatch.context() as patch:
            patch.setattr(place, where, interrupted)
            with pytest.raises(KeyboardInterrupt):
                session.ask(QUESTIONS[0], max_new_tokens=9, keep=False, on_progress=interrupted)
        session.save(tmp_path / "book")
        assert session.stored <= len(session.token_ids)
        with gen.load_session(tmp_path / "book") as loaded:
            for one in (session, loaded):
                out = ask(one, QUESTIONS[2], keep=False)
                assert out.token_ids == expected.token_ids
                if kv_dtype == "fp32":
                    assert torch.equal(out.logits, expected.logits)


def test_a_stream_of_a_closed_generator_says_so(tiny_llama: Path) -> None:
    gen = make(tiny_llama)
    session = gen.prefill(DOCUMENT)
    streams = [session.stream(QUESTIONS[0], max_new_tokens=9), gen.stream(DOCUMENT, max_new_tokens=9)]
    for stream in streams:
        next(stream)
    gen.close()
    for stream in streams:
        with pytest.raises(InputError, match="the generator is closed"):
            for _ in stream:
                pass
    session.close()
