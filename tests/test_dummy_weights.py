"""Dummy weights: random, but with the shapes and the RoPE of a model built in the ordinary way."""

from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from ds_offload.byte_tokenizer import ByteTokenizer
from ds_offload.loading import find_model, load_weights

CPU = torch.device("cpu")
TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 300}


def config_folder(folder: Path, family: str = "llama", **fields) -> Path:
    """A folder with nothing but the config of a tiny model."""
    fields = TINY | {"num_key_value_heads": 2, "max_position_embeddings": 512} | fields
    CONFIG_MAPPING[family](**fields).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("scaling", [None, "linear:4", "dynamic:2", "yarn:4"])
@pytest.mark.parametrize("family", ["llama", "mistral", "mixtral", "qwen2", "qwen3"])
def test_dummy_weights_have_the_shapes_and_rope_of_a_built_model(
    family: str, scaling: str | None, tmp_path: Path
) -> None:
    source = find_model(config_folder(tmp_path, family), load_format="dummy", dtype="fp32", rope_scaling=scaling)
    loaded = load_weights(source, CPU)
    built = AutoModelForCausalLM.from_config(source.config)
    assert loaded.model.state_dict().keys() == built.state_dict().keys()
    for name, weight in loaded.model.state_dict().items():
        assert weight.shape == built.state_dict()[name].shape
        if name.endswith("norm.weight"):
            assert torch.equal(weight, torch.ones_like(weight))
        elif name.endswith("bias"):
            assert torch.equal(weight, torch.zeros_like(weight))
        else:
            assert abs(weight.std().item() - 0.02) < 0.002 and abs(weight.mean().item()) < 0.002
    for length in (700, 3000):
        given = torch.zeros(1, 1), torch.arange(length)[None]
        ours, theirs = loaded.model.model.rotary_emb(*given), built.model.rotary_emb(*given)
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
    assert torch.isfinite(loaded.model(torch.arange(1, 60)[None]).logits).all()
    assert loaded.eos_token_ids == frozenset()
    assert isinstance(loaded.tokenizer, ByteTokenizer)


def test_dummy_weights_are_the_same_every_time_and_tied_once(tmp_path: Path) -> None:
    source = find_model(config_folder(tmp_path, tie_word_embeddings=True), load_format="dummy")
    first, second = load_weights(source, CPU), load_weights(source, CPU)
    assert first.fingerprint == second.fingerprint
    assert first.model.lm_head.weight is first.model.model.embed_tokens.weight
    assert sum(parameter.numel() for parameter in first.model.parameters()) == source.shape.parameters
    assert {parameter.dtype for parameter in first.model.parameters()} == {torch.bfloat16}


def test_dummy_with_a_vocabulary_too_small_for_bytes_takes_ids_only(tmp_path: Path) -> None:
    folder = config_folder(tmp_path, vocab_size=200)
    assert load_weights(find_model(folder, load_format="dummy"), CPU).tokenizer is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_the_weights_are_allocated_once() -> None:
    cuda = torch.device("cuda")
    source = find_model("smollm2-135m", load_format="dummy")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = load_weights(source, cuda).model
    assert torch.cuda.max_memory_allocated() - before < 1.05 * 2 * source.shape.parameters
    assert torch.isfinite(model(torch.arange(1, 60, device=cuda)[None]).logits).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_checkpoint_has_one_fingerprint_on_both_devices(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(find_model(config_folder(tmp_path), load_format="dummy").config)
    model.save_pretrained(tmp_path)
    loaded = load_weights(find_model(tmp_path), torch.device("cuda"))
    assert loaded.device.type == "cuda"
    assert loaded.fingerprint == load_weights(find_model(tmp_path), CPU).fingerprint
