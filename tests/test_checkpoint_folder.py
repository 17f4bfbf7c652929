"""A folder of safetensors: an index of shards that cannot be trusted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ds_offload.checkpoint_folder import weight_files
from ds_offload.errors import LoadError

INDEX = "model.safetensors.index.json"


def test_the_shards_of_an_index_each_once(tmp_path: Path) -> None:
    names = ["model-2.safetensors", "model-1.safetensors"]
    for name in names:
        (tmp_path / name).touch()
    shards = {"a": names[0], "b": names[1], "c": names[0]}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": shards}))
    assert weight_files(tmp_path) == [tmp_path / name for name in sorted(names)]


@pytest.mark.parametrize("weights", [{}, {"a": None}, {"a": 1}, {"a": "x.safetensors", "b": None}, {"a": []}, [], None])
def test_a_damaged_index_is_one_line(weights: Any, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weights}))
    with pytest.raises(LoadError, match=r"index\.json cannot be read: .*; fetch the file again") as caught:
        weight_files(tmp_path)
    assert "\n" not in str(caught.value)
