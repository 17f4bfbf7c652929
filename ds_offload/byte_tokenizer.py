"""A tokenizer for models that have none: one byte of UTF-8 is one token."""

from __future__ import annotations

from collections.abc import Iterable

from ds_offload.errors import InputError

BYTES = 256


class ByteTokenizer:
    """Token ids 0 to 255 are bytes; ids above them decode to U+FFFD. It has no special tokens.

    Raises:
        InputError: A vocabulary of fewer than 256 tokens.
    """

    chat_template: str | None = None
    eos_token_id: int | None = None
    bos_token_id: int | None = None

    def __init__(self, vocab_size: int = BYTES) -> None:
        if vocab_size < BYTES:
            raise InputError(
                f"vocab_size={vocab_size} is too small for text as bytes, which needs {BYTES}; give token ids"
            )
        self.vocab_size = vocab_size

    def __len__(self) -> int:
        return self.vocab_size

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The text's UTF-8 bytes; `add_special_tokens` adds none, there are none."""
        return list(text.encode("utf-8", errors="replace"))

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": self.encode(text, add_special_tokens)}

    def decode(self, ids: int | Iterable[int], skip_special_tokens: bool = False) -> str:
        """Text of the ids; bytes that are no UTF-8 and ids over 255 become U+FFFD."""
        ids = [ids] if isinstance(ids, int) else ids
        # 0xFF never stands in UTF-8, so it decodes to the replacement character.
        return bytes(token if 0 <= token < BYTES else 0xFF for token in map(int, ids)).decode("utf-8", errors="replace")
