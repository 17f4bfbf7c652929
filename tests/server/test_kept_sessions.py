"""Which session a prompt goes on with, and that nothing else of it shows."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from session_case import DOCUMENT, NEW, QUESTIONS, make
from tiny_models import random_prompts

from ds_offload.errors import MemoryPlanError
from ds_offload.generator import OffloadedGenerator
from ds_offload.server.kept_sessions import Answer, Cancelled, KeptSessions

OTHER = random_prompts(160, seed=8)[0]


def kept(generator: OffloadedGenerator, keep: int) -> Any:
    sessions = KeptSessions(generator, keep, lambda: contextlib.nullcontext(lambda *progress: None))
    return contextlib.closing(sessions)


def ask(sessions: KeptSessions, ids: list[int], **options: Any) -> Answer:
    given: dict[str, Any] = {"on_piece": lambda piece: None, "check": lambda: None} | options
    return sessions.answer(ids, {"max_new_tokens": NEW}, **given)


def test_turns_of_one_conversation(tiny_llama: Path) -> None:
    with make(tiny_llama) as generator, kept(generator, 1) as sessions:
        prompt, before = DOCUMENT, 0
        for question in QUESTIONS:
            prompt = prompt + question
            pieces: list[str] = []
            answer = ask(sessions, prompt, on_piece=pieces.append)
            assert answer.cached_tokens == before
            expected = generator.generate(prompt, max_new_tokens=NEW)
            assert answer.output.token_ids == expected.token_ids
            assert "".join(pieces) == answer.output.text == expected.text
            before = len(prompt)
            prompt = prompt + answer.output.token_ids


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_thread_of_its_own_answers_two_conversations(tiny_llama: Path, device: str) -> None:
    """As the server's does; on a GPU it captures the graphs, too."""
    with make(tiny_llama, device) as generator, kept(generator, 2) as sessions, ThreadPoolExecutor(1) as thread:
        for question in QUESTIONS:
            for prompt in (DOCUMENT + question, OTHER + question):
                answer = thread.submit(ask, sessions, prompt).result()
                assert answer.output.token_ids == generator.generate(prompt, max_new_tokens=NEW).token_ids


@pytest.mark.parametrize(("keep", "cached"), [(0, [0, 0, 0, 0]), (1, [0, 0, 0, 0]), (2, [0, 0, 150, 160])])
def test_two_conversations_in_turn(tiny_llama: Path, keep: int, cached: list[int]) -> None:
    with make(tiny_llama) as generator, kept(generator, keep) as sessions:
        prompts = [DOCUMENT, OTHER, DOCUMENT + QUESTIONS[0], OTHER + QUESTIONS[0]]
        answers = [ask(sessions, prompt) for prompt in prompts]
        assert [answer.cached_tokens for answer in answers] == cached
        for prompt, answer in zip(prompts, answers, strict=True):
            assert answer.output.token_ids == generator.generate(prompt, max_new_tokens=NEW).token_ids
        assert len(sessions._sessions) == keep


def test_little_in_common_is_read_anew(tiny_llama: Path) -> None:
    """A short prompt does not cut a long session down, nor does a long one go on from a short beginning."""
    with make(tiny_llama) as generator, kept(generator, 3) as sessions:
        assert ask(sessions, DOCUMENT).cached_tokens == 0
        assert ask(sessions, [*DOCUMENT[:70], 1]).cached_tokens == 0
        assert ask(sessions, [*DOCUMENT, 2]).cached_tokens == len(DOCUMENT)
        assert ask(sessions, DOCUMENT[:70] + OTHER).cached_tokens == 0
        assert ask(sessions, [*DOCUMENT[:100], *OTHER[:60]]).cached_tokens == 100


def test_one_that_shares_as_much_but_is_longer_is_passed_over(tiny_llama: Path) -> None:
    with make(tiny_llama) as generator, kept(generator, 3) as sessions:
        for prompt in ([*DOCUMENT[:20], *OTHER], DOCUMENT[:20]):
            assert ask(sessions, prompt).cached_tokens == 0
        assert ask(sessions, DOCUMENT).cached_tokens == 20
        assert len(sessions._sessions) == 2


def test_a_long_turn_goes_on_from_a_short_one(tiny_llama: Path) -> None:
    with make(tiny_llama) as generator, kept(generator, 1) as sessions:
        ask(sessions, DOCUMENT[:20])
        answer = ask(sessions, DOCUMENT)
        assert answer.cached_tokens == 20
        assert answer.output.token_ids == generator.generate(DOCUMENT, max_new_tokens=NEW).token_ids


@pytest.mark.parametrize("ids", [[7], [7, 8]])
def test_the_shortest_prompts(tiny_llama: Path, ids: list[int]) -> None:
    with make(tiny_llama) as generator, kept(generator, 1) as sessions:
        expected = generator.generate(ids, max_new_tokens=NEW).token_ids
        assert [ask(sessions, ids).output.token_ids for _ in range(2)] == [expected, expected]


def test_cancelled_while_it_reads(tiny_llama: Path) -> None:
    def cancel() -> None:
        raise Cancelled

    with make(tiny_llama) as generator, kept(generator, 1) as sessions:
        with pytest.raises(Cancelled):
            ask(sessions, DOCUMENT, check=cancel)
        assert sessions._sessions == []
        ask(sessions, DOCUMENT)
        with pytest.raises(Cancelled):
            ask(sessions, DOCUMENT + QUESTIONS[2], check=cancel)
        answer = ask(sessions, DOCUMENT + QUESTIONS[2])
        assert answer.cached_tokens == len(DOCUMENT)
        expected = generator.generate(DOCUMENT + QUESTIONS[2], max_new_tokens=NEW).token_ids
        assert answer.output.token_ids == expected


def test_cancelled_while_it_answers(tiny_llama: Path) -> None:
    pieces: list[str] = []

    def cancel() -> None:
        if len(pieces) == 3:
            raise Cancelled

    with make(tiny_llama) as generator, kept(generator, 1) as sessions:
        with pytest.raises(Cancelled):
            ask(sessions, DOCUMENT, on_piece=pieces.append, check=cancel)
        assert ask(sessions, DOCUMENT).cached_tokens == len(DOCUMENT) - 1


def test_one_that_failed_is_closed(tiny_llama: Path) -> None:
    def fail(piece: str) -> None:
        raise RuntimeError("no more")

    with make(tiny_llama) as generator, kept(generator, 1) as sessions:
        with pytest.raises(RuntimeError, match="no more"):
            ask(sessions, DOCUMENT, on_piece=fail)
        assert sessions._sessions == []
        assert ask(sessions, DOCUMENT).cached_tokens == 0


def test_where_memory_is_short_the_oldest_goes(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with make(tiny_llama) as generator, kept(generator, 3) as sessions:
        ask(sessions, DOCUMENT)
        ask(sessions, OTHER)
        prefill, room = generator.prefill, 1

        def short(*arguments: Any, **options: Any) -> Any:
            if len(sessions._sessions) > room:
                raise MemoryPlanError("no room")
            return prefill(*arguments, **options)

        monkeypatch.setattr(generator, "prefill", short)
        third = random_prompts(90, seed=9)[0]
        assert ask(sessions, third).cached_tokens == 0
        assert [session.token_ids for session in sessions._sessions] == [OTHER, third]
        room = -1
        with pytest.raises(MemoryPlanError):
            ask(sessions, random_prompts(80, seed=10)[0])
