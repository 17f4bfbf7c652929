"""`run --session` and `session list|show|verify|rm`, by name and by path."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ds_offload.session_file import SessionWriteError

CPU = ("--device", "cpu", "--max-new-tokens", "6")
BOOK = "\n".join(f"{n}. Call me Ishmael." for n in range(12))
IDS = " ".join(str(7 * i % 300) for i in range(1, 41))


@dataclass
class Kept:
    """Where the session is, and the model it is of."""

    folder: Path
    model: str

    @property
    def both_ways(self) -> list[list[str]]:
        """What names it on the command line."""
        return [[self.folder.name, "--sessions-dir", str(self.folder.parent)], [str(self.folder)]]


def keep(command: Any, model: str, sessions: Path) -> Kept:
    """Read the book under the name "book"."""
    ended = command(
        *("run", "--device", "cpu", "--max-new-tokens", "1", "--model", model, "--prompt", BOOK),
        *("--question", "Who?", "--session", "book", "--sessions-dir", str(sessions)),
    )
    assert ended.status == 0, ended.err
    return Kept(sessions / "book", model)


@pytest.fixture
def kept(command: Any, chat_model: str, tmp_path: Path) -> Kept:
    return keep(command, chat_model, tmp_path / "kept")


@pytest.mark.parametrize("kind", ["chat", "plain"])
def test_a_question_costs_its_own_tokens(
    command: Any, chat_model: str, plain_model: str, tmp_path: Path, kind: str
) -> None:
    model = chat_model if kind == "chat" else plain_model
    file = tmp_path / "book.txt"
    file.write_text(BOOK, encoding="utf-8")
    common = ("run", *CPU, "--model", model, "--json")
    session = ("--session", "book", "--sessions-dir", str(tmp_path / "kept"))
    for number, question in enumerate(("Who wrote it?", "Why?", "Who wrote it?")):
        alone = command(*common, "--prompt-file", str(file), "--question", question)
        document = ("--prompt-file", str(file)) if number != 1 else ()
        ended = command(*common, *session, *document, "--question", question)
        assert ended.status == 0, ended.err
        out, expected = json.loads(ended.out), json.loads(alone.out)
        assert out["token_ids"] == expected["token_ids"] and out["prompt_tokens"] == expected["prompt_tokens"]
        assert out["stats"]["prefilled_tokens"] < 40
        assert ("is kept as the session" in ended.err) == (number == 0)
    streamed = command("run", *CPU, "--model", model, *session, "--question", "Why?")
    assert streamed.out.rstrip("\n") == json.loads(command(*common, *session, "--question", "Why?").out)["text"].rstrip(
        "\n"
    )
    assert " new of " in streamed.error_lines[-1]


def test_token_ids_in_and_out(command: Any, ids_model: str, tmp_path: Path) -> None:
    place = str(tmp_path / "here" / "book")
    common = ("run", *CPU, "--model", ids_model, "--session", place, "--question", "5 6 7", "--json")
    first = command(*common, stdin=IDS.encode())
    second = command(*common)
    assert first.status == second.status == 0, first.err + second.err
    assert json.loads(first.out)["token_ids"] == json.loads(second.out)["token_ids"]
    assert json.loads(second.out)["stats"]["prefilled_tokens"] == 3
    assert command(*common, "--prompt", IDS).status == 0
    ended = command(*common, "--prompt", IDS + " 9")
    assert ended.status == 2 and "of another document" in ended.err


def test_list_show_verify_rm(command: Any, kept: Kept) -> None:
    for name in kept.both_ways:
        shown = command("session", "show", *name)
        assert shown.status == 0 and "label bits" in shown.out and kept.model in shown.out
        facts = json.loads(command("session", "show", *name, "--json").out)
        assert facts["tokens"] == facts["document_tokens"] and facts["path"] == str(kept.folder)
        verified = command("session", "verify", *name)
        assert verified.status == 0 and f"{kept.folder} is sound: 6 files" in verified.out
        listed = command("session", "list", *name)
        assert listed.status == 0 and listed.out.startswith(f"book  {facts['tokens']:,} tokens  ")
    both = ("session", "list", "--sessions-dir", str(kept.folder.parent))
    assert command(*both).out == command("session", "list", str(kept.folder.parent)).out == listed.out
    assert [row["name"] for row in json.loads(command(*both, "--json").out)["sessions"]] == ["book"]
    removed = command("session", "rm", *kept.both_ways[0])
    assert removed.status == 0 and not kept.folder.exists()
    assert command(*both).out == f"no sessions in {kept.folder.parent}\n"


def test_damage_is_found_listed_and_removed(command: Any, refused: Any, kept: Kept) -> None:
    layer = kept.folder / "layer-0001.safetensors"
    data = bytearray(layer.read_bytes())
    data[200] ^= 1
    layer.write_bytes(data)
    for name in kept.both_ways:
        verified = refused("session", "verify", *name).err
        assert "layer-0001.safetensors is damaged" in verified and verified.count("; read the document again\n") == 1
    asked = ("run", *CPU, "--model", kept.model, "--session", str(kept.folder), "--question", "Why?")
    assert "layer-0001.safetensors is damaged" in command(*asked).error_lines[-1]
    layer.write_bytes(data[:-1])
    for name in ("verify", "show"):
        assert "bytes and" in refused("session", name, str(kept.folder)).err
    listed = command("session", "list", "--sessions-dir", str(kept.folder.parent))
    assert listed.status == 0 and "layer-0001.safetensors has" in listed.out
    assert command("session", "rm", str(kept.folder)).status == 0
    assert not kept.folder.exists()


def test_wrong_input(refused: Any, command: Any, kept: Kept, plain_model: str, tmp_path: Path) -> None:
    folder = str(kept.folder.parent)
    session = ("--session", "book", "--sessions-dir", folder)
    run = ("run", *CPU, "--model", kept.model)
    (tmp_path / "file").write_text("text")
    wrong = {
        (*run, *session): "--session needs --question",
        (*run, *session, "--question", "Why?", "--trace", str(tmp_path / "t")): "goes without --trace; leave one",
        (*run, *session, "--question", " "): "--question is empty",
        (*run, *session, "--question", "Why?", "--prompt", "Another book."): "of another document",
        (*run, *session, "--question", "Why?", "--prompt-file", "nowhere.txt"): "does not exist",
        (*run, "--session", "new", "--question", "Why?"): "new yet, and no prompt was given",
        (*run, "--session", str(tmp_path / "file" / "new"), "--question", "Why?", "--prompt", BOOK): "is no folder",
        (*run, "--session", "../", "--question", "Why?"): "is no session",
        (*run, "--session", ".", "--question", "Why?"): "is no name of a session",
        (*run, "--session", "", "--question", "Why?"): "is no name of a session",
        (*run, "--session", str(tmp_path / "file"), "--question", "Why?"): "is no session",
        (*run, "--session", "book", "--question", "Why?", "--sessions-dir", ""): "sessions_dir='' is empty",
        (*run, "--session", "./book", "--question", "Why?", "--sessions-dir", folder): "is for names; leave one of",
        (*run, "--prompt", "Why?", "--sessions-dir", folder): "is for --session, which was not given",
        ("session", "list", "--sessions-dir", ""): "sessions_dir='' is empty",
        (*run, "--session", "long", "--question", "Why?", "--prompt", "long " * 200): "max_context=512",
        ("session", "list", "nowhere"): "there is no folder",
        ("session", "list", "--sessions-dir", str(tmp_path / "nowhere")): "is no folder",
        ("session", "nothing"): "No such command",
    }
    for command_name in ("show", "verify", "rm"):
        wrong |= {
            ("session", command_name): "Missing argument",
            ("session", command_name, "nowhere", "--sessions-dir", folder): "nowhere",
            ("session", command_name, str(tmp_path / "file")): "session",
            ("session", command_name, "a b"): "is no name of a session",
        }
    for arguments, words in wrong.items():
        assert words in refused(*arguments).err, arguments
    other = command("run", *CPU, "--model", plain_model, *session, "--question", "Why?")
    assert other.status == 2 and "is of another model (fingerprint" in other.error_lines[-1]
    chat = command("run", *CPU, "--model", plain_model, *session, "--question", "Why?", "--chat")
    assert chat.status == 2 and "--chat needs a chat template" in chat.error_lines[-1]
    bits = command(*run, *session, "--question", "Why?", "--label-bits", "8")
    assert bits.status == 2 and "label_code (product, here scalar)" in bits.error_lines[-1]


def test_a_session_that_cannot_be_saved_answers_all_the_same(
    command: Any, chat_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise SessionWriteError("cannot write the session: No space left on device")

    monkeypatch.setattr("ds_offload.session.write_session", full)
    ended = command(
        *("run", *CPU, "--model", chat_model, "--session", str(tmp_path / "book")),
        *("--prompt", BOOK, "--question", "Why?"),
    )
    assert ended.status == 1 and ended.out.strip()
    assert "No space left on device" in ended.error_lines[-1]


def test_a_checkpoint_beside_a_session(command: Any, kept: Kept, chat_model: str, tmp_path: Path) -> None:
    """Of a session that is read it is said to be of no use; of a new one it is refused before weights load."""
    folder, file = tmp_path / "begun", tmp_path / "file"
    file.touch()
    common = ("run", *CPU, "--model", chat_model, "--question", "Why?")
    read = command(*common, "--session", str(kept.folder), "--checkpoint", str(folder))
    assert read.status == 0 and "is read already: --checkpoint is not used" in read.err and not folder.exists()
    new = ("--session", str(tmp_path / "new"), "--prompt", BOOK, "--checkpoint", str(file))
    refused = command(*common, *new)
    assert refused.status == 2 and "cannot write to the checkpoint folder" in refused.error_lines[-1]
    assert "calibrat" not in refused.err


def test_a_document_on_standard_input_is_compared_or_said_not_to_be_read(kept: Kept, tmp_path: Path) -> None:
    """A file is read as one given by --prompt-file is. A pipe may be that of a loop over questions."""
    asked = [sys.executable, "-m", "ds_offload", "run", *CPU, "--model", kept.model, "--session", str(kept.folder)]

    def ask(text: str, *more: str, file: bool = False) -> subprocess.CompletedProcess[str]:
        given: dict[str, Any] = {"input": text}
        if file:
            (tmp_path / "text").write_text(text)
            given = {"stdin": (tmp_path / "text").open()}
        return subprocess.run([*asked, "-q", "Why?", *more], **given, capture_output=True, text=True, timeout=120)

    for other in (ask("Another book.", file=True), ask("Another book.", "--prompt-file", "-")):
        assert other.returncode == 2 and not other.stdout
        assert "is of another document" in other.stderr
    nothing = ask("")
    for answered in (nothing, ask(BOOK, file=True), ask("\n", file=True), ask("Another book.")):
        assert answered.returncode == 0, answered.stderr
        assert answered.stdout == nothing.stdout
    assert "what comes through the pipe is not read" in answered.stderr and "pipe" not in nothing.stderr


def test_what_fails_behind_the_reading_is_refused_before_it(
    refused: Any, ids_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("ds_offload.preparation.load_weights", load)
    monkeypatch.chdir(tmp_path)
    new = ("run", *CPU, "--model", ids_model, "--session", "./new", "--prompt", IDS)
    assert "--stop needs a tokenizer" in refused(*new, "-q", "5 6", "--stop", "end").err
    assert "token id 300 is outside the model's vocabulary" in refused(*new, "-q", "5 300").err
    for folder in ("./new", str(tmp_path / "new"), "new/begun"):
        line = refused(*new, "-q", "5 6", "--checkpoint", folder).err
        assert f"--checkpoint {folder} is in the folder of the session" in line and "another folder" in line
    assert not (tmp_path / "new").exists()


def test_help(command: Any) -> None:
    assert "verify" in command("session").out
    for name in ("list", "show", "verify", "rm"):
        ended = command("session", name, "--help")
        assert ended.status == 0 and "--sessions-dir" in ended.out and "--debug" in ended.out
