"""Text as bytes."""

import pytest

from ds_offload.byte_tokenizer import ByteTokenizer
from ds_offload.errors import InputError


@pytest.mark.parametrize("text", ["", "plain", "Café — 中文 🙂\n\t\x00"])
def test_text_comes_back(text: str) -> None:
    tokenizer = ByteTokenizer(32000)
    ids = tokenizer(text)["input_ids"]
    assert ids == list(text.encode()) == tokenizer.encode(text)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(tokenizer) == 32000


def test_ids_over_255_and_bytes_that_are_no_text_are_marked() -> None:
    assert ByteTokenizer().decode([72, 256, 105, 31999]) == "H\ufffdi\ufffd"
    assert ByteTokenizer().decode([0xC3]) == "\ufffd"
    assert ByteTokenizer().decode(65) == "A"


def test_a_vocabulary_under_256_is_refused() -> None:
    with pytest.raises(InputError, match="needs 256"):
        ByteTokenizer(255)
