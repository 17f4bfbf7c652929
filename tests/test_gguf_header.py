"""What is taken of GGUF files' headers."""

import os
from pathlib import Path

import gguf
import numpy as np
import pytest

from ds_offload.errors import LoadError
from ds_offload.gguf_header import FREQUENCY_FACTORS, read_gguf_header


def write(path: Path, alignment: int | None = None) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    for name, add, value in (
        ("byte", writer.add_uint8, 255),
        ("short", writer.add_int16, -7),
        ("long", writer.add_uint64, 2**63),
        ("half", writer.add_float32, 0.5),
        ("third", writer.add_float64, 1 / 3),
        ("yes", writer.add_bool, True),
        ("text", writer.add_string, "naïve"),
        ("numbers", writer.add_array, [1, 2, 3]),
        ("texts", writer.add_array, ["", "é", "a longer one"]),
        ("nested", writer.add_array, [[1, 2], [3, 4]]),
        ("last", writer.add_uint32, 9),
    ):
        add(f"test.{name}", value)
    writer.add_tensor("odd", np.arange(7, dtype=np.float32))
    writer.add_tensor(FREQUENCY_FACTORS, np.array([1, 2.5, 32], dtype=np.float32))
    writer.add_tensor("square", np.zeros((3, 5), dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("alignment", [None, 256])
def test_numbers_texts_and_tensors(alignment: int | None, tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", alignment)
    header = read_gguf_header(tmp_path / "m.gguf")
    stated = {name.removeprefix("test."): value for name, value in header.values.items() if name.startswith("test.")}
    assert stated == {
        "byte": 255,
        "short": -7,
        "long": 2**63,
        "half": 0.5,
        "third": 1 / 3,
        "yes": True,
        "text": "naïve",
        "last": 9,
    }
    assert header.values["general.architecture"] == "llama"
    assert header.tensors == {"odd", FREQUENCY_FACTORS, "square"}
    assert header.frequency_factors == (1, 2.5, 32)
    assert read_gguf_header(tmp_path / "m.gguf") is header


def test_a_file_that_was_written_anew_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write(path)
    before = read_gguf_header(path)
    write(path, 256)
    os.utime(path, ns=(0, 0))
    assert "general.alignment" not in before.values
    assert read_gguf_header(path).values["general.alignment"] == 256


def test_what_is_no_gguf_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf")
    whole = (tmp_path / "m.gguf").read_bytes()
    for damaged in (b"", b"GGML" + whole[4:], whole[:4] + bytes([9]) + whole[5:], whole[:200]):
        (tmp_path / "damaged.gguf").write_bytes(damaged)
        with pytest.raises(LoadError, match=r"damaged\.gguf cannot be read as GGUF"):
            read_gguf_header(tmp_path / "damaged.gguf")
