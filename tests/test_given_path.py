"""Paths as users give them from Python: each that is none is refused in one line, wherever it is given."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from session_case import DOCUMENT, make

from ds_offload import InputError, OffloadConfig, OffloadedGenerator
from ds_offload.given_path import given_path

WRONG = {"number": 5, "flag": True, "bytes": b"book", "empty": "", "NUL": "bo\0ok", "long": "a" * 256}
SAID = {
    "number": "=5 is no path",
    "flag": "=True is no path",
    "bytes": "is no path",
    "empty": "is empty",
    "NUL": "NUL",
    "long": "has 256 bytes",
}


@pytest.fixture(scope="module")
def gen(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Iterator[OffloadedGenerator]:
    with make(tiny_llama) as generator:
        yield generator


def test_a_path_is_expanded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert given_path("~/book", "path") == given_path(Path("~/book"), "path") == tmp_path / "book"


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_no_path(gen: OffloadedGenerator, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    wrong: Any = WRONG[kind]
    with gen.prefill(DOCUMENT) as session:
        calls = {
            "path": [lambda: session.save(wrong), lambda: gen.load_session(wrong)],
            "trace": [lambda: gen.generate(DOCUMENT, trace=wrong), lambda: gen.stream(DOCUMENT, trace=wrong)],
            "checkpoint": [
                lambda: gen.generate(DOCUMENT, checkpoint=wrong),
                lambda: gen.prefill(DOCUMENT, checkpoint=wrong),
            ],
            "kv_dir": [lambda: OffloadConfig(kv_dir=wrong)],
            "calibration": [lambda: OffloadConfig(calibration=wrong)],
        }
        for field, made in calls.items():
            for call in made:
                with pytest.raises(InputError, match=SAID[kind]) as refused:
                    call()
                assert str(refused.value).startswith(f"{field}=")
    assert not list(tmp_path.iterdir())
