"""`ds-offload chat`: answers are those of a session, whatever is typed between the questions."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from chat_case import BOOK, CPU, NEW, QUESTIONS, asked, lines, opened, printed

from ds_offload import InputError, OffloadConfig, OffloadedGenerator
from ds_offload.cli.typed_lines import TypedLines
from ds_offload.prompts import encode_prompt, tokenize
from ds_offload.session_file import SessionWriteError
from ds_offload.session_header import SessionHeader


@pytest.fixture
def book(tmp_path: Path) -> str:
    file = tmp_path / "book.txt"
    file.write_text(BOOK, encoding="utf-8")
    return str(file)


@pytest.mark.parametrize("kind", ["chat", "plain"])
def test_answers_about_a_document(command: Any, chat_model: str, plain_model: str, book: str, kind: str) -> None:
    model = chat_model if kind == "chat" else plain_model
    ended = command("chat", *CPU, "--model", model, "--prompt-file", book, stdin=lines(*QUESTIONS))
    with opened(model) as session:
        assert ended.out == printed(*asked(session, *QUESTIONS))
    assert ended.status == 0 and "> " not in ended.err
    assert ended.err.count("the answer is cut: --max-new-tokens 8 is reached") == 3


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_a_conversation_has_the_tokens_of_the_template(command: Any, chat_model: str, system: str | None) -> None:
    given = ("--system", system) if system is not None else ()
    ended = command("chat", *CPU, "--model", chat_model, *given, stdin=lines(*QUESTIONS[:2]))
    messages = [{"role": "system", "content": system}] if system is not None else []
    with opened(chat_model, None, system) as session:
        tokenizer = session._generator.tokenizer
        opening = list(session.token_ids)
        first, second = (session.ask(question, max_new_tokens=NEW) for question in QUESTIONS[:2])
        assert ended.out == printed(first.text, second.text)
        whole = encode_prompt([*messages, {"role": "user", "content": QUESTIONS[0]}], tokenizer)
        assert whole[: len(opening)] == opening
        between = tokenize(f"\n<user>{QUESTIONS[1]}\n<assistant>", tokenizer, special=False)
        assert session.token_ids == whole + first.token_ids + between + second.token_ids
        assert second.stats["prefilled_tokens"] == 1 + len(between), "a turn costs its own tokens"
        generated = session._generator.generate(whole, max_new_tokens=NEW)
        assert generated.token_ids == first.token_ids


def test_lines_with_a_backslash_and_lines_of_nothing(command: Any, chat_model: str, book: str) -> None:
    common = ("chat", *CPU, "--model", chat_model, "--prompt-file", book)
    ended = command(*common, stdin=b"\xef\xbb\xbfWho \\\r\nwrote it?\r\n\n  \n /help?\nWhy?\\")
    with opened(chat_model) as session:
        assert ended.out == printed(*asked(session, "Who \nwrote it?", "/help?", "Why?"))
    assert ended.status == 0
    wrong = command(*common, stdin=b"Who?\n\xff\xfe\n")
    assert wrong.status == 2 and "line 2 of standard input is not UTF-8 text" in wrong.error_lines[-1]
    assert command(*common, stdin=b"/exit\nWho?\n").out == ""


def test_undo(command: Any, chat_model: str, book: str) -> None:
    given = lines("/undo", QUESTIONS[0], QUESTIONS[1], "/undo", QUESTIONS[2])
    ended = command("chat", *CPU, "--model", chat_model, "--prompt-file", book, stdin=given)
    with opened(chat_model) as session:
        answers = asked(session, *QUESTIONS[:2])
        session.undo()
        assert ended.out == printed(*answers, *asked(session, QUESTIONS[2]))
    assert "error: there is nothing to undo" in ended.err and "the last question is forgotten; " in ended.err
    assert ended.status == 2


def test_saved_and_gone_on_with(command: Any, chat_model: str, book: str, tmp_path: Path) -> None:
    kept = ("--sessions-dir", str(tmp_path / "kept"))
    common = ("chat", *CPU, "--model", chat_model, *kept)
    first = command(*common, "--session", "book", "--prompt-file", book, stdin=lines(QUESTIONS[0], "/save"))
    assert first.status == 0, first.err
    assert f"tokens are kept as the session {tmp_path / 'kept' / 'book'}" in first.error_lines[-1]
    second = command(*common, "--session", "book", stdin=lines(QUESTIONS[1], "/save other", "/save"))
    # The document that it is of may be given again.
    third = command(*common, "--session", "other", "--prompt-file", book, stdin=lines(QUESTIONS[2]))
    assert second.status == third.status == 0, second.err + third.err
    with opened(chat_model) as session:
        expected = [printed(text) for text in asked(session, *QUESTIONS)]
    assert [first.out, second.out, third.out] == expected
    tokens = [len(SessionHeader.read(tmp_path / "kept" / name).token_ids) for name in ("book", "other")]
    assert tokens[0] < tokens[1]
    # What `run` asks goes on from there, and is not kept.
    ran = command("run", *CPU, "--model", chat_model, *kept, "--session", "other", "--question", QUESTIONS[2])
    assert ran.status == 0 and ran.out == third.out


def test_a_conversation_without_a_document_is_saved(command: Any, chat_model: str, tmp_path: Path) -> None:
    place = str(tmp_path / "talk")
    common = ("chat", *CPU, "--model", chat_model)
    first = command(*common, "--system", "Be brief.", stdin=lines(QUESTIONS[0], f"/save {place}"))
    second = command(*common, "--session", place, stdin=lines(QUESTIONS[1]))
    with opened(chat_model, None, "Be brief.") as session:
        assert [first.out, second.out] == [printed(text) for text in asked(session, *QUESTIONS[:2])]
    other = command(*common, "--session", place, "--prompt-file", __file__, stdin=b"")
    assert other.status == 2 and "is of another document" in other.error_lines[-1]


def test_what_is_refused_on_the_way_loses_nothing(command: Any, chat_model: str, book: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    wrong = {
        "/nothing": "there is no command /nothing; /help lists them",
        "/undo 3": "/undo takes nothing behind it",
        "/save": "has no name yet",
        "/save a b": "is no name of a session",
        f"/save {tmp_path / 'file'}": "is there already and is no session",
        f"/save {tmp_path / 'old'}": "is there already; give another name",
        "long " * 90: "the question takes 4",
    }
    common = ("chat", *CPU, "--model", chat_model, "--prompt-file", book)
    command(*common, stdin=lines(f"/save {tmp_path / 'old'}"))
    ended = command(*common, stdin=lines(QUESTIONS[0], *wrong, "/stats", QUESTIONS[1]))
    with opened(chat_model) as session:
        assert ended.out == printed(*asked(session, *QUESTIONS[:2]))
        left = 512 - len(session.token_ids) + len("\n<user>Why?\n<assistant>") + NEW
    errors = [line for line in ended.error_lines if line.startswith("ds-offload: error: ")]
    assert len(errors) == len(wrong) and ended.status == 2
    for line, words in zip(errors, wrong.values(), strict=True):
        assert words in line
    assert f"and {left} are left of max_context=512 for it and its answer" in errors[-1]
    stats = [line for line in ended.error_lines if "new tokens at" in line]
    assert (
        len(stats) == 1
        and "ms/token" in stats[0]
        and "tokens attended a step" in stats[0]
        and "/token from" in stats[0]
    )
    assert f"{512 - left} of 512 tokens, room for {left} more" in ended.err


def test_an_answer_that_fills_the_context_says_so(command: Any, chat_model: str, book: str) -> None:
    given = ("chat", *CPU, "--model", chat_model, "--prompt-file", book, "--ctx", "240", "--max-new-tokens", "200")
    ended = command(*given, stdin=lines("Why?", "And then?"))
    assert "the answer is cut: the context is full" in ended.err
    assert "and 0 are left of max_context=240" in ended.error_lines[-1]


def test_a_session_that_cannot_be_saved_goes_on(
    command: Any, chat_model: str, book: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise SessionWriteError("cannot write the session: No space left on device")

    monkeypatch.setattr("ds_offload.session.write_session", full)
    common = ("chat", *CPU, "--model", chat_model, "--prompt-file", book, "--session", str(tmp_path / "new"))
    ended = command(*common, stdin=lines(QUESTIONS[0], "/save", QUESTIONS[1]))
    with opened(chat_model) as session:
        assert ended.out == printed(*asked(session, *QUESTIONS[:2]))
    assert ended.err.count("No space left on device") == 2 and ended.status == 2


def test_what_is_refused_before_weights_load(
    refused: Any, command: Any, chat_model: str, plain_model: str, ids_model: str, book: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    saved, of_ids = str(tmp_path / "saved"), str(tmp_path / "ids")
    common = ("chat", *CPU, "--model", chat_model)
    assert command(*common, "--session", saved, "--prompt-file", book, stdin=b"").status == 0
    with (
        OffloadedGenerator.from_pretrained(chat_model, config=OffloadConfig(), device="cpu") as generator,
        generator.prefill([1, 2, 3] * 9) as session,
    ):
        session.save(of_ids)

    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("ds_offload.preparation.load_weights", load)
    other = tmp_path / "other.txt"
    other.write_text("Another book.")
    wrong = {
        (*common, "--prompt-file", str(tmp_path / "none")): "does not exist",
        (*common, "--prompt-file", "-"): "--prompt-file - is standard input",
        (*common, "--prompt-file", book, "--ctx", "64"): "max_context=64 leaves no room for an answer",
        (*common, "--prompt-file", book, "--system", "Be brief."): "--system goes without --prompt-file",
        (*common, "--system", ""): "the system message is empty",
        (*common, "--ctx", "3"): "max_context=3",
        (*common, "--temperature", "-1"): "temperature",
        (*common, "--prompt", "Hi"): "No such option",
        (*common, "--session", str(tmp_path / "none")): "yet; give --prompt-file FILE",
        (*common, "--session", "a b"): "is no name of a session",
        (*common, "--session", saved, "--prompt-file", str(other)): "is of another document",
        (*common, "--session", saved, "--ctx", "64"): "max_context=64",
        (*common, "--session", of_ids): "is of token ids",
        ("chat", "--model", ids_model): "chat needs a tokenizer",
        ("chat", "--model", ids_model, "--prompt-file", book): "chat needs a tokenizer",
        ("chat", "--model", plain_model): "a conversation needs a chat template",
    }
    for arguments, words in wrong.items():
        assert words in refused(*arguments).err, arguments
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(InputError, match="standard input is closed"):
        TypedLines()
