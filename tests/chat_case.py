"""What `ds-offload chat` is asked in tests, and the session that gives the same answers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ds_offload import OffloadConfig, OffloadedGenerator
from ds_offload.session import Session

NEW = 8
CPU = ("--device", "cpu", "--max-new-tokens", str(NEW))
BOOK = "\n".join(f"{n}. Call me Ishmael." for n in range(8))
QUESTIONS = ("Who wrote it?", "Why?", "When was that?")


@contextmanager
def opened(model: str, document: str | None = BOOK, system: str | None = None) -> Iterator[Session]:
    with OffloadedGenerator.from_pretrained(model, config=OffloadConfig(), device="cpu") as generator:
        session = generator.converse(system) if document is None else generator.prefill(document)
        with session:
            yield session


def printed(*answers: str) -> str:
    """Answers as they come through a pipe."""
    return "\n".join(text if text.endswith("\n") else text + "\n" for text in answers)


def asked(session: Session, *questions: str) -> list[str]:
    return [session.ask(question, max_new_tokens=NEW).text for question in questions]


def lines(*entries: str) -> bytes:
    return "".join(entry + "\n" for entry in entries).encode()
