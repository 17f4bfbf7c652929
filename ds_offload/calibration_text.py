"""The text that a model is calibrated on: the one that ships, or the beginning of a user's own, as token ids."""

from __future__ import annotations

from importlib import resources
from typing import TYPE_CHECKING

from ds_offload.errors import InputError
from ds_offload.prompts import encode_prompt

if TYPE_CHECKING:
    from ds_offload.loading import LoadedModel

DEFAULT_TOKENS = 4096
SHIPPED_TEXT = "the shipped text"


def text_ids(loaded: LoadedModel, document: str, tokens: int = DEFAULT_TOKENS) -> list[int]:
    """The first `tokens` token ids of `document`, fewer where it is shorter.

    Raises:
        InputError: The model has no tokenizer, or the document no token.
    """
    if loaded.tokenizer is None:
        raise InputError(
            f"{loaded.source.name} has no tokenizer, and calibration on a text needs one; "
            "put tokenizer.json into the model's folder"
        )
    # A token stands for a few characters: of a long document only the beginning need be tokenised.
    return encode_prompt(document[: tokens * 64], loaded.tokenizer, loaded.source.shape.vocab_size)[:tokens]


def shipped_text() -> str:
    """The English text that comes with the package for calibration."""
    return resources.files("ds_offload").joinpath("data/calibration.txt").read_text(encoding="utf-8")
