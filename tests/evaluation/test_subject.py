"""The context of an evaluation, and what is refused before the weights load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_config

from ds_offload import InputError, OffloadConfig
from ds_offload.evaluation.subject import EvalSubject, prepare
from ds_offload.preparation import PreparedModel


def dummy(folder: Path, family: str = "llama", **fields: Any) -> dict[str, Any]:
    """Arguments of `prepare` for random weights of a config that is saved to `folder`."""
    config = tiny_config(family, **{"vocab_size": 300} | fields)
    config.save_pretrained(folder)
    return {"name": str(folder), "load_format": "dummy", "device": "cpu", "dtype": "fp32", "rope_scaling": None}


def prepared_of(folder: Path, least: int = 0, **fields: Any) -> PreparedModel:
    return prepare(dummy(folder, **fields), OffloadConfig(), least)


WINDOW = {"family": "qwen2", "use_sliding_window": True, "max_window_layers": 1}


@pytest.mark.parametrize(
    ("positions", "window", "least", "context"),
    [
        (8192, 4096, 0, 2048),
        (8192, 4096, 3000, 3000),
        (8192, 4096, 5000, 4096),
        (8192, 1024, 0, 1024),
        (512, 1024, 0, 512),
    ],
)
def test_the_default_context_keeps_within_a_sliding_window(
    positions: int, window: int, least: int, context: int, tmp_path: Path
) -> None:
    fields = WINDOW | {"max_position_embeddings": positions, "sliding_window": window}
    assert prepared_of(tmp_path, least, **fields).config.max_context == context


def test_a_context_beyond_a_sliding_window_is_refused(tmp_path: Path) -> None:
    model = dummy(tmp_path, **WINDOW, max_position_embeddings=8192, sliding_window=1024)
    with pytest.raises(InputError, match="sliding window of 1,024 tokens"):
        prepare(model, OffloadConfig(max_context=2048))


def test_layers_that_are_all_dense_leave_nothing_to_measure(tmp_path: Path) -> None:
    model = dummy(tmp_path, max_position_embeddings=512)
    with pytest.raises(InputError, match="dense_layers names all 3 layers of the model, so nothing sparse") as caught:
        EvalSubject(prepare(model, OffloadConfig(dense_layers=(0, 1, 2))))
    assert "\n" not in str(caught.value)
    EvalSubject(prepare(model, OffloadConfig(dense_layers=(0, 2))))


@pytest.mark.parametrize("hot_set", [None, 1])
def test_a_dtype_that_is_left_open_is_settled_whatever_the_hot_set(hot_set: float | None, tmp_path: Path) -> None:
    config = OffloadConfig(max_context=8192, host_memory="40MiB", hot_set=hot_set)
    assert EvalSubject(prepare(dummy(tmp_path, max_position_embeddings=8192), config)).config.kv_dtype == "int8"
