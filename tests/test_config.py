"""Config values that follow from others."""

from __future__ import annotations

from typing import Any

import pytest

from ds_offload.config import OffloadConfig, parse_bytes, parse_tokens
from ds_offload.errors import InputError
from ds_offload.kernels.label_codec import LabelLayout
from ds_offload.label_choice import default_label_channels


@pytest.mark.parametrize(
    ("head_dim", "bits", "channels", "row_bytes"),
    [
        (64, 2, 28, 8),
        (128, 2, 60, 16),
        (80, 2, 44, 12),
        (96, 2, 44, 12),
        (256, 2, 124, 32),
        (16, 2, 12, 4),
        (4, 2, 4, 4),
        (64, 4, 14, 8),
        (64, 8, 7, 8),
        (64, 16, 4, 8),
        (80, 16, 6, 12),
    ],
)
def test_default_label_channels_fill_their_rows(head_dim: int, bits: int, channels: int, row_bytes: int) -> None:
    assert default_label_channels(head_dim, bits) == channels
    assert LabelLayout(channels, bits).row_bytes == row_bytes


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("4096", 4096),
        (7, 7),
        ("1.5k", 1536),
        ("0.5k", 512),
        ("2.0", 2),
        ("1_000", 1000),
        ("1,048k", 1048 * 1024),
        (str(2**53 - 1), 2**53 - 1),
    ],
)
def test_sizes_in_tokens(text: int | str, tokens: int) -> None:
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize("text", ["1,5k", "1,16", "12,34", "1,0000", ",5", "1__0", "4096,"])
def test_a_comma_stands_between_thousands(text: str) -> None:
    """Elsewhere it may be a decimal point, or another number's: 1,5k is not 15k, and 1,16 not 116."""
    with pytest.raises(InputError, match=f"max_context='{text}' is not a size"):
        parse_tokens(text)
    with pytest.raises(InputError, match=f"token_budget='{text}' is no budget"):
        OffloadConfig(token_budget=text)


@pytest.mark.parametrize(("text", "tokens"), [("1.3k", 1331), ("1.2M", 1_258_291), ("0.5k", 512)])
def test_a_part_of_a_unit_is_rounded_down(text: str, tokens: int) -> None:
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize("text", ["2.9", "20.7", "0.5", "9." + "9" * 5000])
def test_a_part_of_a_token_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"is not a whole number; write a number of tokens such as 4096, 256k or 1M"):
        parse_tokens(text)


@pytest.mark.parametrize("text", ["0", -1, 2**53, "8388608g", "1" + "0" * 30, "1" + "0" * 320, "9" * 5000])
def test_sizes_are_under_2_to_the_53(text: int | str) -> None:
    with pytest.raises(InputError, match=r"must be at least 1 and under 2\^53; write a number of tokens") as caught:
        parse_tokens(text)
    assert len(str(caught.value)) < 200


def test_memory_may_come_to_a_part_of_a_byte() -> None:
    """As the plan prints it."""
    assert parse_bytes("23.72GiB") == int(23.72 * 2**30) and parse_bytes("1.5kB") == 1500
    with pytest.raises(InputError, match="is not a whole number; write a number of bytes such as 24GiB or 24GB"):
        parse_bytes("1.5")


@pytest.mark.parametrize("field", ["sink_tokens", "recent_tokens", "monitor_every"])
def test_whole_numbers_are_under_2_to_the_53(field: str) -> None:
    with pytest.raises(InputError, match=rf"{field}=1000.* must be a whole number of at least \d and under 2\^53"):
        OffloadConfig(**{field: 10**30})


@pytest.mark.parametrize("field", ["calibration", "kv_dir"])
def test_an_empty_path_is_refused(field: str) -> None:
    """It would be the current folder."""
    with pytest.raises(InputError, match=f"{field}='' is empty; give a path"):
        OffloadConfig(**{field: ""})


@pytest.mark.parametrize("layers", [1, None, "0", [0, "1"], [True], [-1]])
def test_dense_layers_that_are_no_layer_numbers(layers: Any) -> None:
    with pytest.raises(InputError, match="must be layer numbers from 0, such as"):
        OffloadConfig(dense_layers=layers)
