"""A context that a model has read: a text's own rows, labels and selections."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ds_offload.calibration import Calibration
from ds_offload.config import OffloadConfig
from ds_offload.decoder import DecoderStack
from ds_offload.errors import InputError
from ds_offload.kv_context import KVContext
from ds_offload.prefill import prefill


def read_windows(path: str, tokenizer: Any, tokens: int, sequences: int) -> list[list[int]]:
    """The first `sequences` stretches of `tokens` tokens each of a text file.

    Raises:
        InputError: No tokenizer, no such text, or one that is too short.
    """
    if tokenizer is None:
        raise InputError("--text needs a model with a tokenizer; this one has none")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"text={path} cannot be read as UTF-8 text ({error}); give a text file") from None
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) < tokens * sequences:
        raise InputError(
            f"text={path} has {len(ids):,} tokens, and {sequences} x {tokens:,} are asked for; "
            "give a longer text, or lower --ctx or --batch"
        )
    return [ids[n * tokens : (n + 1) * tokens] for n in range(sequences)]


@contextmanager
def read_context(
    decoder: DecoderStack, config: OffloadConfig, calibration: Calibration, windows: list[list[int]], capacity: int
) -> Iterator[tuple[KVContext, list[int]]]:
    """A context whose sequences have read `windows` and may grow to `capacity`, and each one's next token."""
    with torch.no_grad(), KVContext(decoder, config, calibration, [capacity] * len(windows)) as context:
        logits = [prefill(decoder, context, number, ids) for number, ids in enumerate(windows)]
        try:
            yield context, [int(row.argmax()) for row in logits]
        finally:
            if decoder.device.type == "cuda":
                torch.cuda.synchronize(decoder.device)
