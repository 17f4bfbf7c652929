"""Texts to train on: read from files, without what evaluations read."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from pathlib import Path

# A paragraph that shares so many words in a row with a held-out text is left out.
SHARED_WORDS = 10
SUFFIXES = (".txt", ".html", ".md")
_LONG_PARAGRAPH = 2000


def read_text(path: Path) -> str:
    """A file's text; of HTML what stands between the tags."""
    text = path.read_text(encoding="utf-8", errors="replace")
    if path.suffix == ".html":
        text = re.sub(r"(?is)<(script|style|head)\b.*?</\1>", " ", text)
        text = re.sub(r"(?i)</?(p|div|h\d|li|tr|pre|dt|dd|table|ul|ol)\b[^>]*>", "\n\n", text)
        text = html.unescape(re.sub(r"<[^>]*>", "", text))
        text = re.sub(r"[ \t\xa0]+", " ", text)
        text = re.sub(r" ?\n ?", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def read_source(place: Path) -> list[str]:
    """The texts of a file, or of all text files of a folder, in the order of their names."""
    if place.is_file():
        return [read_text(place)]
    files = sorted(path for path in place.rglob("*") if path.is_file() and path.suffix in SUFFIXES)
    if not files:
        raise SystemExit(f"{place} holds no file named {', '.join('*' + suffix for suffix in SUFFIXES)}")
    return [text for text in map(read_text, files) if text]


def word_runs(texts: Iterable[str]) -> set[int]:
    """Hashes of every run of `SHARED_WORDS` words."""
    return {run for text in texts for run in _runs(text)}


def without(texts: list[str], held_out: set[int]) -> str:
    """The texts' paragraphs, less those that share a run of words with a held-out text."""
    kept = (part for text in texts for part in _paragraphs(text) if held_out.isdisjoint(_runs(part)))
    return "".join(kept)


def _paragraphs(text: str) -> Iterable[str]:
    """The text cut into paragraphs, or into lines where a paragraph is long; joined they are the text."""
    for part in re.findall(r"(?s).+?(?:\n\s*\n|\Z)", text + "\n\n"):
        yield from part.splitlines(keepends=True) if len(part) > _LONG_PARAGRAPH else (part,)


def _runs(text: str) -> set[int]:
    words = re.findall(r"\w+", text.lower())
    return {hash(tuple(words[i : i + SHARED_WORDS])) for i in range(max(1, len(words) - SHARED_WORDS + 1))}
