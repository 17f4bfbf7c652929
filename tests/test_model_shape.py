"""Sizes of a model from its config."""

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from ds_offload.errors import LoadError
from ds_offload.model_shape import ModelShape

TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 300}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("family", ["llama", "mistral", "mixtral", "qwen2", "qwen3"])
def test_parameters_are_those_of_a_built_model(family: str, kv_heads: int, tied: bool) -> None:
    config = CONFIG_MAPPING[family](**TINY, num_key_value_heads=kv_heads, tie_word_embeddings=tied)
    shape = ModelShape.from_config(config)
    model = AutoModelForCausalLM.from_config(config)
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.out_features == shape.heads * shape.head_dim
    assert attention.k_proj.out_features == shape.kv_heads * shape.head_dim == kv_heads * shape.head_dim
    assert (shape.layers, shape.hidden_size, shape.intermediate_size, shape.vocab_size) == (3, 64, 96, 300)


def test_a_head_size_of_its_own_is_kept() -> None:
    shape = ModelShape.from_config(CONFIG_MAPPING["qwen3"](**TINY, num_key_value_heads=2, head_dim=32))
    assert shape.head_dim == 32


@pytest.mark.parametrize("layers", [0, -1])
def test_a_config_without_layers_is_refused(layers: int) -> None:
    config = CONFIG_MAPPING["llama"](**TINY)
    config.num_hidden_layers = layers
    with pytest.raises(LoadError, match=f"num_hidden_layers={layers} must be at least 1; fetch config.json again"):
        ModelShape.from_config(config)


def test_the_config_is_left_as_it_was() -> None:
    config = CONFIG_MAPPING["llama"](**TINY)
    config.dtype = torch.float16
    before = config.to_dict()
    ModelShape.from_config(config)
    assert config.to_dict() == before


def test_what_fused_kernels_take_is_known_without_weights() -> None:
    assert ModelShape.from_config(CONFIG_MAPPING["llama"](**TINY)).plain
    assert not ModelShape.from_config(CONFIG_MAPPING["llama"](**TINY, mlp_bias=True)).plain
    assert not ModelShape.from_config(CONFIG_MAPPING["llama"](**TINY, hidden_act="gelu")).plain
    assert not ModelShape.from_config(CONFIG_MAPPING["mixtral"](**TINY)).plain
