"""Supported families, refusals by name, and what is said about RoPE."""

import pytest
from transformers import CONFIG_MAPPING, PreTrainedConfig

from ds_offload.errors import InputError
from ds_offload.families import SUPPORTED, check_family, check_supported, describe_rope
from ds_offload.rope_scaling import apply_rope_scaling, original_context, trained_context


def tiny_config(family: str, **fields) -> PreTrainedConfig:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 300, "max_position_embeddings": 4096, "head_dim": 16}
    return CONFIG_MAPPING[family](**(sizes | fields))


def refusal(config: PreTrainedConfig, max_context: int = 1024) -> str:
    with pytest.raises(InputError) as caught:
        check_supported(config, max_context)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("family", SUPPORTED)
def test_supported_families_pass(family: str) -> None:
    check_supported(tiny_config(family, sliding_window=None), 1 << 20)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"model_type": "gemma2", "attn_logit_softcapping": 50.0}, "soft-capping"),
        ({"model_type": "deepseek_v3", "kv_lora_rank": 512}, "multi-head latent attention"),
        ({"model_type": "mamba"}, "state-space"),
        ({"model_type": "jamba", "mamba_d_state": 16}, "state-space"),
        ({"model_type": "qwen3_next", "linear_key_head_dim": 128}, "state-space or recurrent"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "encoder-decoder"),
        ({"model_type": "bloom"}, "ALiBi"),
        ({"model_type": "mpt", "attn_config": {"alibi": True}}, "ALiBi"),
        ({"model_type": "falcon", "alibi": True}, "ALiBi"),
        ({"model_type": "gpt2"}, "gpt2"),
    ],
)
def test_other_families_are_refused_by_name(fields: dict, named: str) -> None:
    with pytest.raises(InputError) as caught:
        check_family("the-model", fields)
    line = str(caught.value)
    assert named in line and fields["model_type"] in line and "the-model" in line
    assert "\n" not in line
    assert all(family in line for family in SUPPORTED.values())


def test_a_config_object_of_another_family_is_refused() -> None:
    assert "soft-capping" in refusal(CONFIG_MAPPING["gemma2"]())


def test_config_without_model_type_is_refused() -> None:
    with pytest.raises(InputError, match="names no model_type"):
        check_family("m", {"hidden_size": 64})


@pytest.mark.parametrize(
    ("quantised", "named"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq"}, "awq"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
    ],
)
def test_quantised_checkpoints_are_refused_by_name(quantised: dict, named: str) -> None:
    line = refusal(tiny_config("llama", quantization_config=quantised))
    assert named in line and "bf16" in line


def test_remote_code_is_refused() -> None:
    assert "auto_map" in refusal(tiny_config("llama", auto_map={"AutoModelForCausalLM": "modeling.Model"}))


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("mistral", {"sliding_window": 512}),
        ("mixtral", {"sliding_window": 512}),
        ("mixtral", {"sliding_window": 512, "layer_types": ["full_attention", "full_attention"]}),
        ("llama", {"sliding_window": 512}),
        ("llama", {"attention_chunk_size": 512}),
        ("llama", {"sliding_window": 512, "layer_types": ["full_attention", "sliding_attention"]}),
        ("qwen2", {"sliding_window": 512, "use_sliding_window": True, "max_window_layers": 1}),
        ("qwen3", {"sliding_window": 512, "use_sliding_window": True, "max_window_layers": 1}),
    ],
)
def test_a_sliding_window_is_refused_only_beyond_it(family: str, fields: dict) -> None:
    config = tiny_config(family, **fields)
    check_supported(config, 512)
    line = refusal(config, 513)
    assert "sliding window of 512" in line and "max_context=512" in line


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("qwen2", {"sliding_window": 512, "use_sliding_window": False}),
        ("qwen2", {"sliding_window": 512, "use_sliding_window": True, "max_window_layers": 2}),
        ("llama", {"sliding_window": 512, "layer_types": ["full_attention", "full_attention"]}),
    ],
)
def test_a_window_that_no_layer_uses_is_no_obstacle(family: str, fields: dict) -> None:
    check_supported(tiny_config(family, **fields), 4096)


def test_partial_rotary_is_refused() -> None:
    parameters = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    assert "0.5" in refusal(tiny_config("llama", rope_parameters=parameters))


def test_an_unknown_kind_of_rope_is_refused() -> None:
    parameters = {"rope_type": "proportional", "rope_theta": 1e4}
    assert "proportional" in refusal(tiny_config("llama", rope_parameters=parameters))


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}


@pytest.mark.parametrize(
    ("positions", "parameters", "original", "trained"),
    [
        (4096, {"rope_type": "default", "rope_theta": 1e4}, 4096, 4096),
        (4096, {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}, 4096, 16384),
        (4096, {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, 4096, 8192),
        (
            32768,
            {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768},
            32768,
            131072,
        ),
        (
            131072,
            {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768},
            32768,
            131072,
        ),
        (
            131072,
            {"rope_type": "yarn", "rope_theta": 1e6, "factor": None, "original_max_position_embeddings": 32768},
            32768,
            131072,
        ),
        (131072, LLAMA3, 8192, 131072),
        (131072, LONG | {"original_max_position_embeddings": 4096}, 4096, 131072),
    ],
)
def test_positions_by_kind_of_rope(positions: int, parameters: dict, original: int, trained: int) -> None:
    config = tiny_config("llama", max_position_embeddings=positions, rope_parameters=dict(parameters))
    assert (original_context(config), trained_context(config)) == (original, trained)
    assert describe_rope(config, original) is None
    line = describe_rope(config, original + 1)
    assert line is not None and "\n" not in line
    if parameters["rope_type"] == "default":
        assert "applied: none" in line
    else:
        assert f"applied: {parameters['rope_type']}" in line


def test_a_yarn_factor_that_is_null_is_said_as_transformers_infers_it() -> None:
    parameters = {"rope_type": "yarn", "rope_theta": 1e6, "factor": None, "original_max_position_embeddings": 32768}
    config = tiny_config("llama", max_position_embeddings=131072, rope_parameters=parameters)
    assert (describe_rope(config, 131_072) or "").endswith("RoPE scaling applied: yarn, factor 4")


def test_extrapolation_is_said_with_a_scaling_that_would_do() -> None:
    config = tiny_config("llama")
    config.name_or_path = "llama-2-7b"
    assert describe_rope(config, 262_144) == (
        "max_context 262,144 is beyond the 4,096 positions llama-2-7b was trained for; RoPE scaling applied: none "
        "(positions are extrapolated as they are); --rope-scaling yarn:64 applies one"
    )


def test_positions_beyond_the_scaling_are_said() -> None:
    config = tiny_config("llama", max_position_embeddings=131072, rope_parameters=dict(LLAMA3))
    assert "extrapolated" not in (describe_rope(config, 131_072) or "")
    assert "reaches 131,072 positions; those beyond are extrapolated" in (describe_rope(config, 262_144) or "")


@pytest.mark.parametrize(
    ("scaling", "kind", "factor", "trained"),
    [
        ("linear:4", "linear", 4.0, 16384),
        ("dynamic", "dynamic", 1.0, 4096),
        ("dynamic:2", "dynamic", 2.0, 8192),
        ("YaRN:4", "yarn", 4.0, 16384),
        ("yarn:1.5", "yarn", 1.5, 6144),
    ],
)
def test_override_sets_the_config(scaling: str, kind: str, factor: float, trained: int) -> None:
    config = tiny_config("llama", rope_parameters={"rope_type": "default", "rope_theta": 5e4})
    apply_rope_scaling(config, scaling)
    assert config.rope_parameters["rope_type"] == kind
    assert config.rope_parameters["factor"] == factor
    assert config.rope_parameters["rope_theta"] == 5e4
    assert (original_context(config), trained_context(config)) == (4096, trained)
    config.validate_rope()


def test_override_replaces_the_checkpoints_own_scaling() -> None:
    config = tiny_config("llama", max_position_embeddings=131072, rope_parameters=dict(LLAMA3))
    apply_rope_scaling(config, "dynamic:4")
    assert config.rope_parameters == {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 5e5}
    assert (original_context(config), trained_context(config)) == (8192, 32768)


@pytest.mark.parametrize("scaling", ["linear:2", "dynamic", "yarn:2"])
@pytest.mark.parametrize("place", ["beside", "within"])
def test_an_override_does_not_hide_that_rotation_is_partial(place: str, scaling: str) -> None:
    share = {"partial_rotary_factor": 0.5}
    parameters = {"rope_type": "default", "rope_theta": 1e4} | (share if place == "within" else {})
    config = tiny_config("llama", rope_parameters=parameters, **(share if place == "beside" else {}))
    apply_rope_scaling(config, scaling)
    assert "rotates only 0.5 of each head" in refusal(config)


@pytest.mark.parametrize(
    "scaling",
    ["yarn", "linear", "llama3:8", "yarn:0.5", "yarn:x", "yarn:", "yarn:inf", "yarn:nan", "yarn:1000001", "", "4"],
)
def test_bad_overrides_are_refused(scaling: str) -> None:
    with pytest.raises(InputError, match="yarn:4") as caught:
        apply_rope_scaling(tiny_config("llama"), scaling)
    assert "\n" not in str(caught.value) and repr(scaling) in str(caught.value)
