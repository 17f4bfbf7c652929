"""Aliases: exact shapes, without disk or network."""

import pytest
import torch

from ds_offload.aliases import ALIASES
from ds_offload.families import check_supported
from ds_offload.loading import find_model

# parameters, layers, heads, KV heads, head size, trained context: as published
PUBLISHED = {
    "smollm2-135m": (134_515_008, 30, 9, 3, 64, 8192),
    "smollm2-135m-64k": (134_515_008, 30, 9, 3, 64, 65536),
    "llama-2-7b": (6_738_415_616, 32, 32, 32, 128, 4096),
    "llama-2-13b": (13_015_864_320, 40, 40, 40, 128, 4096),
    "llama-2-70b": (68_976_648_192, 80, 64, 8, 128, 4096),
    "llama-3.1-8b": (8_030_261_248, 32, 32, 8, 128, 131072),
    "llama-3.1-70b": (70_553_706_496, 80, 64, 8, 128, 131072),
    "mistral-7b": (7_248_023_552, 32, 32, 8, 128, 32768),
    "mixtral-8x7b": (46_702_792_704, 32, 32, 8, 128, 32768),
    "qwen2.5-7b": (7_615_616_512, 28, 28, 4, 128, 32768),
    "qwen3-8b": (8_190_735_360, 36, 32, 8, 128, 40960),
}


def test_every_alias_is_checked() -> None:
    assert set(ALIASES) == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_shape_is_the_published_one(name: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DS_OFFLOAD_CACHE", str(tmp_path / "cache"))
    source = find_model(name, load_format="dummy")
    shape = source.shape
    assert PUBLISHED[name] == (
        shape.parameters,
        shape.layers,
        shape.heads,
        shape.kv_heads,
        shape.head_dim,
        shape.trained_context,
    )
    assert (source.dtype, source.location) == (torch.bfloat16, "")
    assert not list(tmp_path.iterdir())
    check_supported(source.config, 1 << 20)


def test_a_config_is_not_shared_between_uses() -> None:
    first = ALIASES["llama-3.1-8b"].config()
    first.rope_parameters["factor"] = 99.0
    assert ALIASES["llama-3.1-8b"].config().rope_parameters["factor"] == 8.0
