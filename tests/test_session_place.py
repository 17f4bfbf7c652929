"""The place of a saved session: who may write there, and what a killed writer, a link or a slow disk makes of it."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from session_case import DOCUMENT, QUESTIONS, ask, make, tree

from ds_offload import InputError, open_session
from ds_offload.session import Session
from ds_offload.session_file import verify_session
from ds_offload.session_header import SessionHeader
from ds_offload.session_place import recover, remove_session


def test_two_writers_of_one_place_take_turns(tiny_llama: Path, tmp_path: Path) -> None:
    """Two threads have the same process number, as the first processes of two containers have."""
    place, failures = tmp_path / "book", []

    def save(session: Session) -> None:
        try:
            for _ in range(6):
                session.save(place)
        except BaseException as error:
            failures.append(error)

    with make(tiny_llama) as gen, gen.prefill(DOCUMENT[:100]) as short, gen.prefill(DOCUMENT) as long:
        threads = [threading.Thread(target=save, args=(session,)) for session in (short, long)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []
    assert len(verify_session(place).token_ids) in (100, 150)
    assert list(tmp_path.iterdir()) == [place]


def test_a_session_moved_away_by_a_killed_writer_is_found(tiny_llama: Path, saved_session: Path) -> None:
    """Also where a name has characters that patterns are made of; another session's folders are left alone."""
    place = saved_session.with_name("book[1]")
    os.rename(saved_session, place)
    other = place.with_name(".book[1].2.4194303.old")
    other.mkdir()
    os.rename(place, place.with_name(".book[1].4194303.old"))
    with make(tiny_llama) as gen, gen.load_session(place) as session:
        ask(session, QUESTIONS[0])
    assert sorted(place.parent.iterdir()) == [other, place]


def test_ctrl_c_between_the_renames_leaves_the_old_session(
    tiny_llama: Path, saved_session: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, rename = tree(saved_session.parent), os.rename

    def interrupted(source: Path, target: Path) -> None:
        if str(source).endswith(".tmp"):
            raise KeyboardInterrupt
        rename(source, target)

    with make(tiny_llama) as gen, gen.prefill(DOCUMENT[:50]) as session:
        monkeypatch.setattr("ds_offload.session_place.os.rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            session.save(saved_session)
        assert tree(saved_session.parent) == before


def test_a_link_to_a_session_is_followed(tiny_llama: Path, saved_session: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(saved_session)
    with make(tiny_llama) as gen, gen.load_session(link) as session:
        ask(session, QUESTIONS[0])
        session.save(link)
    assert link.is_symlink()
    assert SessionHeader.read(saved_session).token_ids[:159] == DOCUMENT + QUESTIONS[0]
    remove_session(link)
    assert not os.path.lexists(link) and list(saved_session.parent.iterdir()) == []


def test_what_was_replaced_never_comes_back(
    tiny_llama: Path, saved_session: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it could not be removed, and the session is removed later."""
    with make(tiny_llama) as gen, gen.prefill(DOCUMENT[:50]) as session:
        with monkeypatch.context() as patch:
            patch.setattr("ds_offload.session_place.shutil.rmtree", lambda *_, **__: None)
            session.save(saved_session)
        assert len(list(saved_session.parent.iterdir())) == 2
        shutil.rmtree(saved_session)
        recover(saved_session)
        assert not saved_session.exists()


def test_recovery_follows_a_link(tiny_llama: Path, saved_session: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(saved_session)
    os.rename(saved_session, saved_session.with_name(f".{saved_session.name}.deadbeef.old"))
    with make(tiny_llama) as gen:
        gen.load_session(link).close()
        with gen.prefill(DOCUMENT[:50]) as session:
            os.rename(saved_session, saved_session.with_name(f".{saved_session.name}.deadbeef.old"))
            session.save(link)
    assert len(verify_session(saved_session).token_ids) == 50


def test_a_session_that_is_replaced_while_it_loads_is_loaded(
    tiny_llama: Path, saved_session: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with make(tiny_llama) as gen, gen.prefill(DOCUMENT[:50]) as session:
        read = open_session.read_session
        calls = []

        def replaced(folder: Path, header: SessionHeader, context: Any) -> None:
            calls.append(header.stored)
            if len(calls) == 1:
                session.save(saved_session)
            read(folder, header, context)

        monkeypatch.setattr(open_session, "read_session", replaced)
        with gen.load_session(saved_session) as loaded:
            assert len(loaded.token_ids) == 50 and calls == [150, 50]


@pytest.mark.parametrize("name", ["notes.txt", "layer-1.safetensors", "labels.safetensors.bak"])
def test_a_folder_that_holds_other_things_too_is_not_removed(name: str, saved_session: Path) -> None:
    (saved_session / name).write_text("mine")
    before = tree(saved_session)
    with pytest.raises(InputError, match=rf"holds {name}, which is not the session's; move that away first"):
        remove_session(saved_session)
    assert tree(saved_session) == before
    (saved_session / name).unlink()
    remove_session(saved_session)
    assert not saved_session.exists()
