"""`ds-offload summarize` and scripts/summarize.py from end to end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ds_offload.errors import InputError

CPU = ("--device", "cpu")


@pytest.fixture
def book(tmp_path: Path) -> Path:
    file = tmp_path / "book.txt"
    file.write_text("The keeper wrote it down. " * 5)
    return file


def test_a_summary(command: Any, chat_model: str, book: Path) -> None:
    common = ("summarize", *CPU, "--model", chat_model, str(book), "--words", "4")
    ended = command(*common, "--json")
    assert ended.status == 0, ended.err
    result = json.loads(ended.out)
    content = book.read_text().rstrip() + "\n\nSummarize the text above in about 4 words."
    assert result["prompt_tokens"] == len(f"<user>{content}\n<assistant>")
    assert result["new_tokens"] == 8
    streamed = command(*common)
    assert streamed.out.rstrip("\n") == result["text"].rstrip("\n")
    assert "8 new tokens" in streamed.error_lines[-1]


def test_several_files_and_the_usual_options(command: Any, plain_model: str, book: Path) -> None:
    other = book.with_name("notes.txt")
    other.write_text("A note.")
    ended = command(
        *("summarize", *CPU, "--model", plain_model, str(book), str(other), "-", "--json"),
        *("--max-new-tokens", "3", "--token-budget", "16"),
        stdin=b"From the pipe.",
    )
    assert ended.status == 0, ended.err
    result = json.loads(ended.out)
    assert (result["new_tokens"], result["config"]["token_budget"]) == (3, "16")
    document = (
        f"# book.txt\n\n{book.read_text().strip()}\n\n# notes.txt\n\nA note.\n\n# standard input\n\nFrom the pipe."
    )
    task = "Summarize the 3 texts above in about 200 words."
    assert result["prompt_tokens"] == len(f"{document}\n\nQuestion: {task}\nAnswer:")


def test_files_of_the_same_name_keep_their_paths(tmp_path: Path) -> None:
    from ds_offload.cli.summarize import read_documents

    paths = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        paths.append(tmp_path / folder / "text.txt")
        paths[-1].write_text(folder)
    assert read_documents([str(path) for path in paths]) == {str(paths[0]): "a", str(paths[1]): "b"}


def test_one_file_under_two_names_is_refused(book: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ds_offload.cli.summarize import read_documents

    monkeypatch.chdir(book.parent)
    Path("link.txt").symlink_to(book)
    for again in ("./book.txt", str(book), "link.txt"):
        with pytest.raises(InputError, match=f"{again!r} was given twice; give each file once"):
            read_documents(["book.txt", again])
    Path("copy.txt").write_text(book.read_text())
    assert set(read_documents(["book.txt", "copy.txt"])) == {"book.txt", "copy.txt"}


def test_the_advised_factor_stretches_the_original_positions(refused: Any, plain_model: str, book: Path) -> None:
    book.write_text("The keeper wrote it down. " * 60)
    line = refused("summarize", *CPU, "--model", plain_model, str(book), "--rope-scaling", "yarn:2").err
    assert "trained for 1,024" in line and "--rope-scaling yarn:4 --ctx" in line


def test_too_long_for_the_context(command: Any, refused: Any, plain_model: str, book: Path) -> None:
    common = ("summarize", *CPU, "--model", plain_model, str(book), "--words", "20")
    assert command(*common).status == 0
    line = refused(*common, "--ctx", "100").err
    assert "book.txt: " in line and "context of 100 tokens" in line and "set --ctx 2" in line
    book.write_text("The keeper wrote it down. " * 40)
    line = refused(*common).err
    assert "context of 512 tokens" in line and "--model" in line and "--rope-scaling yarn:3 --ctx" in line


def test_wrong_input(refused: Any, ids_model: str, book: Path) -> None:
    common = ("summarize", *CPU, "--model", ids_model)
    assert "does not exist" in refused(*common, str(book), "missing.txt").err
    assert "is a folder" in refused(*common, str(book.parent)).err
    assert "given twice" in refused(*common, str(book), str(book)).err
    assert "words='many'" in refused(*common, str(book), "--words", "many").err
    assert "words=0" in refused(*common, str(book), "--words", "0").err
    assert "token_budget='0'" in refused(*common, str(book), "--token-budget", "0").err
    assert "tokenizer" in refused(*common, str(book)).err


def test_the_script(chat_model: str, book: Path) -> None:
    """Runs from any folder, without the package installed there."""
    script = Path(__file__).resolve().parents[2] / "scripts" / "summarize.py"
    arguments = [*CPU, "--model", chat_model, str(book), "--max-new-tokens", "3", "--json"]
    ended = subprocess.run(
        [sys.executable, str(script), *arguments],
        cwd=book.parent,
        env=os.environ | {"PYTHONPATH": ""},
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["new_tokens"] == 3
