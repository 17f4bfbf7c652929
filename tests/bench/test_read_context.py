"""A context read from a text: the windows are the text's, and decoding goes on as the generator's does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_models import random_prompts, save_tiny, tiny_config

from ds_offload import OffloadConfig, OffloadedGenerator
from ds_offload.bench.decode_steps import time_steps
from ds_offload.bench.read_context import read_context, read_windows
from ds_offload.errors import InputError


def bytes_of(text: str, add_special_tokens: bool) -> dict[str, Any]:
    """A tokenizer: one token a byte."""
    assert not add_special_tokens
    return {"input_ids": list(text.encode())}


def test_windows_follow_one_another(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("abcdefgh")
    assert read_windows(str(file), bytes_of, 3, 2) == [list(b"abc"), list(b"def")]


@pytest.mark.parametrize(
    ("content", "tokenizer", "message"),
    [
        (b"abcde", bytes_of, "has 5 tokens, and 2 x 3 are asked for"),
        (b"\xff\xfe", bytes_of, "cannot be read as UTF-8"),
        (None, bytes_of, "cannot be read"),
        (b"abcdefgh", None, "needs a model with a tokenizer"),
    ],
)
def test_wrong_texts_are_refused(content: bytes | None, tokenizer: Any, message: str, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        read_windows(str(file), tokenizer, 3, 2)
    assert "\n" not in str(error.value)


def test_decoding_goes_on_from_what_was_read(tmp_path: Path) -> None:
    save_tiny(tmp_path, tiny_config("llama"))
    prompts = [random_prompts(90)[0], random_prompts(90, 91)[1][:90]]
    config = OffloadConfig(max_context=1024, token_budget="1/2", sink_tokens=2, recent_tokens=4, hot_set=2)
    with OffloadedGenerator.from_pretrained(str(tmp_path), config=config, device="cpu") as gen:
        outs = gen.generate(prompts, max_new_tokens=2)
        assert gen._calibration is not None
        with read_context(gen.decoder, gen.config, gen._calibration, prompts, 100) as (context, tokens):
            assert tokens == [out.token_ids[0] for out in outs]
            times = time_steps(gen.decoder, context, [90, 90], 3, 4, tokens)
    assert times.traffic.selected > 0 and times.traffic.hit_rate is not None and 0 < times.traffic.hit_rate <= 1
