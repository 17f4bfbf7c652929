"""`Session.stream_prompt`: whole prompts, of which a session reads only what is new, answered as if read whole."""

from __future__ import annotations

from pathlib import Path

import pytest
from session_case import DOCUMENT, NEW, QUESTIONS, make

from ds_offload import InputError


@pytest.mark.parametrize("kv_dtype", ["fp32", "int8"])
def test_three_turns_are_answered_as_prompts_read_whole(tiny_llama: Path, kv_dtype: str) -> None:
    """Answers of a sparse decoder are read anew as a prompt is: nothing of how they were made stays."""
    with make(tiny_llama, kv_dtype=kv_dtype) as generator, generator.prefill(DOCUMENT[:-1]) as session:
        prompt, seen = list(DOCUMENT), len(DOCUMENT) - 1
        for question in QUESTIONS:
            prompt += question
            "".join(session.stream_prompt(prompt, max_new_tokens=NEW))
            output = session.last_output
            assert output is not None
            assert output.stats["prefilled_tokens"] == len(prompt) - seen
            if kv_dtype == "fp32":
                assert output.token_ids == generator.generate(prompt, max_new_tokens=NEW).token_ids
            assert session.token_ids == prompt and session.document_tokens == session.stored == len(prompt)
            seen = len(prompt)
            prompt += output.token_ids


@pytest.mark.parametrize("shared", [0, 1, 70, 149])
def test_a_prompt_that_leaves_the_session_early(tiny_llama: Path, shared: int) -> None:
    other = DOCUMENT[:shared] + [(token + 1) % 300 for token in DOCUMENT[shared:]]
    with make(tiny_llama) as generator, generator.prefill(DOCUMENT) as session:
        session.ask(QUESTIONS[0], max_new_tokens=NEW)
        for prompt in (other, DOCUMENT, [5]):
            list(session.stream_prompt(prompt, max_new_tokens=NEW))
            assert session.last_output is not None
            assert session.last_output.token_ids == generator.generate(prompt, max_new_tokens=NEW).token_ids


def test_closed_early_it_keeps_the_prompt_alone(tiny_llama: Path, tmp_path: Path) -> None:
    with make(tiny_llama) as generator, generator.prefill(DOCUMENT) as session:
        prompt = DOCUMENT + QUESTIONS[0]
        stream = session.stream_prompt(prompt, max_new_tokens=NEW)
        next(stream)
        next(stream)
        stream.close()
        assert session.token_ids == prompt and session.stored == len(prompt)
        session.save(tmp_path / "kept")
        with generator.load_session(tmp_path / "kept") as loaded:
            assert loaded.token_ids == prompt
        expected = generator.generate(prompt + QUESTIONS[2], max_new_tokens=NEW).token_ids
        assert session.ask(QUESTIONS[2], max_new_tokens=NEW).token_ids == expected


def test_an_error_while_it_reads_leaves_what_was_there(tiny_llama: Path) -> None:
    def fail(phase: str, done: int, total: int) -> None:
        raise RuntimeError("no more")

    with make(tiny_llama) as generator, generator.prefill(DOCUMENT) as session:
        prompt = DOCUMENT[:100] + QUESTIONS[2]
        with pytest.raises(RuntimeError, match="no more"):
            list(session.stream_prompt(prompt, on_progress=fail, max_new_tokens=NEW))
        assert session.token_ids == DOCUMENT and session.stored == 100
        expected = generator.generate(DOCUMENT + QUESTIONS[0], max_new_tokens=NEW).token_ids
        assert session.ask(QUESTIONS[0], max_new_tokens=NEW).token_ids == expected


def test_streams_that_come_too_late(tiny_llama: Path) -> None:
    """They are refused, and change nothing."""
    with make(tiny_llama) as generator, generator.prefill(DOCUMENT) as session:
        late = session.stream_prompt(DOCUMENT[:20])
        running = session.stream_prompt(DOCUMENT, max_new_tokens=NEW)
        next(running)
        with pytest.raises(InputError, match="still answering"):
            next(late)
        running.close()
        session.ask(QUESTIONS[1], max_new_tokens=NEW)
        known = session.token_ids
        late = session.stream_prompt(DOCUMENT[:20])
        session.ask(QUESTIONS[2], max_new_tokens=NEW)
        with pytest.raises(InputError, match="went on"):
            next(late)
        assert session.token_ids[: len(known)] == known and len(session.token_ids) > len(known)


def test_what_is_refused(tiny_llama: Path) -> None:
    with make(tiny_llama) as generator, generator.prefill(DOCUMENT) as session:
        with pytest.raises(InputError, match="outside the model's vocabulary"):
            session.stream_prompt([1, 300])
        with pytest.raises(InputError, match="no room for an answer"):
            session.stream_prompt([1] * 400)
        with pytest.raises(InputError, match="empty list"):
            session.stream_prompt([])


def test_a_prompt_leaves_nothing_to_undo(tiny_llama: Path) -> None:
    with make(tiny_llama) as generator, generator.prefill(DOCUMENT) as session:
        session.ask(QUESTIONS[0], max_new_tokens=NEW)
        list(session.stream_prompt(DOCUMENT + QUESTIONS[1], max_new_tokens=NEW))
        with pytest.raises(InputError, match="nothing to undo"):
            session.undo()
        assert session.token_ids == DOCUMENT + QUESTIONS[1]
        session.ask(QUESTIONS[2], max_new_tokens=NEW)
        session.undo()
        expected = generator.generate(DOCUMENT + QUESTIONS[1] + QUESTIONS[0], max_new_tokens=NEW).token_ids
        assert session.ask(QUESTIONS[0], max_new_tokens=NEW).token_ids == expected
