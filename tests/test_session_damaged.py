"""Files of a saved session that were cut, changed or taken away: found before anything is read."""

from __future__ import annotations

from pathlib import Path

import pytest
from session_case import FILES, make

from ds_offload.errors import LoadError
from ds_offload.session_file import verify_session
from ds_offload.session_place import HEADER


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_flipped_byte_is_found(tiny_llama: Path, saved_session: Path, name: str) -> None:
    data = bytearray((saved_session / name).read_bytes())
    with make(tiny_llama) as gen:
        for position in (3, len(data) // 2, len(data) - 1):
            damaged = data.copy()
            damaged[position] ^= 4
            (saved_session / name).write_bytes(damaged)
            for call in (lambda: gen.load_session(saved_session), lambda: verify_session(saved_session)):
                with pytest.raises(LoadError) as error:
                    call()
                assert "damaged" in str(error.value) and name in str(error.value)
                assert "\n" not in str(error.value)
        (saved_session / name).write_bytes(data)
        gen.load_session(saved_session).close()


@pytest.mark.parametrize("name", sorted(FILES))
@pytest.mark.parametrize("damage", ["cut", "longer", "empty", "missing"])
def test_a_file_of_another_length_is_found(tiny_llama: Path, saved_session: Path, name: str, damage: str) -> None:
    data = (saved_session / name).read_bytes()
    (saved_session / name).unlink()
    if damage != "missing":
        (saved_session / name).write_bytes({"cut": data[:-1], "longer": data + b"x", "empty": b""}[damage])
    with make(tiny_llama) as gen:
        for call in (lambda: gen.load_session(saved_session), lambda: verify_session(saved_session)):
            with pytest.raises(LoadError) as error:
                call()
            assert name in str(error.value) and "\n" not in str(error.value)
            assert name == HEADER or str(error.value).endswith("; read the document again")
            assert damage != "missing" or name == HEADER or " is missing; " in str(error.value)
