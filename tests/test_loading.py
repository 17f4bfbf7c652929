"""Finding and loading models: folders, hub and GGUF, and every refusal in one line."""

import json
import struct
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from ds_offload.errors import InputError, LoadError
from ds_offload.loading import find_model, load_weights

CPU = torch.device("cpu")
FAMILIES = ["llama", "mistral", "mixtral", "qwen2", "qwen3"]
TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 300}


def tiny_model(family: str = "llama", seed: int = 0, **fields) -> PreTrainedModel:
    torch.manual_seed(seed)
    fields = {"max_position_embeddings": 512, "num_key_value_heads": 2} | fields
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**(TINY | fields))).eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny llama without a tokenizer."""
    tiny_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit_config(folder: Path, **fields) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def refused(name: str | Path, *parts: str, kind: type[InputError] = LoadError, load: bool = False, **options) -> str:
    """The one line in which a model is refused; `load`: by load_weights, not before."""
    source = find_model(name, **options) if load else None
    with pytest.raises(kind) as caught:
        load_weights(source, CPU) if source is not None else find_model(name, **options)
    line = str(caught.value)
    assert "\n" not in line and len(line) < 600
    for part in parts:
        assert part in line
    return line


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_loads_as_transformers_loads_it(family: str, tied: bool, tmp_path: Path) -> None:
    tiny_model(family, tie_word_embeddings=tied).to(torch.bfloat16).save_pretrained(tmp_path)
    source = find_model(tmp_path)
    assert (source.location, source.dtype, source.shape.layers) == (str(tmp_path), torch.bfloat16, 3)
    loaded = load_weights(source, CPU)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(1, 40)[None]
    assert torch.equal(loaded.model(ids).logits, theirs(ids).logits)
    assert loaded.model.dtype == theirs.dtype
    assert loaded.device == CPU and loaded.tokenizer is None
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(("dtype", "expected"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_dtype_is_overridden(dtype: str, expected: torch.dtype, folder: Path) -> None:
    source = find_model(folder, dtype=dtype)
    assert source.dtype == expected
    assert load_weights(source, CPU).model.dtype == expected


@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_dtype_comes_from_the_weights_where_the_config_states_none(stored: torch.dtype, tmp_path: Path) -> None:
    tiny_model().to(stored).save_pretrained(tmp_path)
    edit_config(tmp_path, dtype=None)
    assert find_model(tmp_path).dtype == stored
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == stored


def test_sharded_weights_load(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path, max_shard_size="100KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    load_weights(find_model(tmp_path), CPU)
    shards[-1].unlink()
    refused(tmp_path, shards[-1].name, "index")


def test_eos_comes_from_the_generation_config_first(folder: Path) -> None:
    assert load_weights(find_model(folder), CPU).eos_token_ids == {2}
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 7]}))
    assert load_weights(find_model(folder), CPU).eos_token_ids == {5, 7}
    (folder / "generation_config.json").unlink()
    edit_config(folder, eos_token_id=9)
    assert load_weights(find_model(folder), CPU).eos_token_ids == {9}
    edit_config(folder, eos_token_id=None)
    assert load_weights(find_model(folder), CPU).eos_token_ids == frozenset()


def test_a_tokenizer_in_the_folder_is_read(folder: Path) -> None:
    words = {"[UNK]": 0, "one": 1, "two": 2}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, "[UNK]")), unk_token="[UNK]").save_pretrained(
        folder
    )
    loaded = load_weights(find_model(folder), CPU)
    assert loaded.tokenizer is not None and loaded.tokenizer("two")["input_ids"] == [2]


@pytest.mark.parametrize("content", ["{", "[]", '{"version": "1.0"}', ""])
def test_a_broken_tokenizer_is_an_error(content: str, folder: Path) -> None:
    (folder / "tokenizer.json").write_text(content)
    refused(folder, "tokenizer", str(folder), load=True)


def test_a_tokenizer_without_vocabulary_is_an_error(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    refused(folder, "no vocabulary", "tokenizer.json", load=True)


def test_unknown_names_name_the_three_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    ways = ("local folder of safetensors", ".gguf file", "hub id or alias")
    refused("nonsense", "'nonsense'", "smollm2-135m", *ways)
    refused("a/b/c", "'a/b/c'", *ways)
    refused("./nonsense", "'./nonsense'", "does not exist", *ways)
    refused(str(tmp_path / "none"), "does not exist", *ways)
    refused("  ", "empty", *ways, kind=InputError)
    refused(5, "the model's name is 5, which is no text", *ways, kind=InputError)  # type: ignore[arg-type]
    refused(None, "the model's name is None", *ways, kind=InputError)  # type: ignore[arg-type]
    refused("./two\nlines", "two\\nlines", *ways)


def test_no_hub_is_one_line_with_the_three_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args, **options):
        raise OSError("cannot connect\nsecond line")

    monkeypatch.setattr("ds_offload.hub.snapshot_download", unreachable)
    ways = ("local folder of safetensors", ".gguf file", "hub id or alias")
    line = refused("org/name", "no weights to be had for org/name", "cannot connect second line", *ways)
    assert "dummy" not in line
    refused("llama-2-7b", "no weights to be had for llama-2-7b", "Llama-2-7b-chat-hf", "--load-format dummy", *ways)


def test_a_hub_checkpoint_loads_from_its_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def snapshot(hub_id: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked.append((hub_id, "*.safetensors" in allow_patterns))
        return str(folder)

    monkeypatch.setattr("ds_offload.hub.snapshot_download", snapshot)
    source = find_model("org/name")
    assert (source.location, asked) == ("org/name", [("org/name", False)])
    loaded = load_weights(source, CPU)
    assert set(asked[1:]) == {("org/name", True)}
    assert loaded.fingerprint == load_weights(find_model(folder), CPU).fingerprint


@pytest.mark.parametrize("content", ["{", "[]", "", "\xff"])
def test_a_broken_config_is_refused(content: str, folder: Path) -> None:
    (folder / "config.json").write_bytes(content.encode("latin-1"))
    refused(folder, "config.json")


def test_a_config_of_no_sound_model_is_refused(folder: Path) -> None:
    edit_config(folder, hidden_size="many")
    refused(folder, "config.json")
    edit_config(folder, hidden_size=63)
    refused(folder)


def test_what_is_no_checkpoint_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, "pytorch_model.bin", "safetensors or GGUF only")
    (folder / "pytorch_model.bin").rename(folder / "model.gguf")
    refused(folder, "model.gguf", "that file's path")
    refused(folder / "config.json", "is a file")
    (folder / "model.gguf").unlink()
    refused(folder, "no model.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    refused(folder, "adapter")
    (folder / "config.json").unlink()
    refused(folder, "no config.json")


def test_truncated_weights_are_refused(folder: Path) -> None:
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for size in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        weights.write_bytes(whole[:size])
        refused(folder, str(folder), "cannot be loaded", load=True)
    edit_config(folder, dtype=None)
    weights.write_bytes(whole[:100])
    refused(folder, "no sound safetensors file")


def test_weights_of_another_shape_or_missing_ones_are_refused(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=4)
    refused(folder, "lacks 9 weights", "model.layers.3.", load=True)
    edit_config(folder, num_hidden_layers=3, intermediate_size=128)
    refused(folder, "cannot be loaded", load=True)


def test_weights_that_go_unused_are_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_config(folder, num_hidden_layers=2)
    load_weights(find_model(folder), CPU)
    assert "9 weights that go unused, such as model.layers.2." in capsys.readouterr().err


def test_families_and_remote_code_are_refused_before_transformers_reads_the_config(folder: Path) -> None:
    edit_config(folder, auto_map={"AutoConfig": "configuration_x.XConfig"})
    refused(folder, "auto_map", "never run", kind=InputError)
    edit_config(folder, model_type="a_new_family")
    refused(folder, "a_new_family", kind=InputError)


@pytest.mark.parametrize(
    ("options", "named"),
    [({"dtype": "int8"}, "int8"), ({"load_format": "pt"}, "pt"), ({"rope_scaling": "yarn"}, "yarn:4")],
)
def test_bad_options_are_refused(options: dict, named: str, folder: Path) -> None:
    refused(folder, named, kind=InputError, **options)


def test_an_unsupported_stored_dtype_asks_for_a_choice(folder: Path) -> None:
    edit_config(folder, dtype="float64")
    refused(folder, "float64", "--dtype", kind=InputError)
    assert find_model(folder, dtype="fp32").dtype == torch.float32


@pytest.mark.parametrize("scaling", ["linear:4", "dynamic:2", "yarn:4"])
def test_rope_scaling_reaches_the_rotary_module(scaling: str, folder: Path) -> None:
    plain = load_weights(find_model(folder), CPU)
    scaled = load_weights(find_model(folder, rope_scaling=scaling), CPU)
    assert scaled.source.shape.trained_context == 512 * int(scaling[-1])
    positions = torch.arange(0, 2048, 7)[None]
    x = torch.zeros(1, 1)
    assert not torch.equal(
        plain.model.model.rotary_emb(x, positions)[0], scaled.model.model.rotary_emb(x, positions)[0]
    )
    assert plain.fingerprint != scaled.fingerprint


def test_a_fingerprint_belongs_to_the_checkpoint(tmp_path: Path) -> None:
    def print_of(model: PreTrainedModel, name: str, **options) -> str:
        model.save_pretrained(tmp_path / name)
        return load_weights(find_model(tmp_path / name, **options), CPU).fingerprint

    first = print_of(tiny_model(), "first")
    assert first == print_of(tiny_model(), "same, elsewhere")
    assert first == print_of(tiny_model(), "as bf16", dtype="bf16")
    assert first != print_of(tiny_model(seed=1), "other weights")
    assert first != print_of(tiny_model(rms_norm_eps=1e-3), "other config")
    changed = tiny_model()
    with torch.no_grad():
        changed.model.layers[1].self_attn.k_proj.weight.mul_(1.5)
    assert first != print_of(changed, "one projection changed")


def test_nothing_is_printed_on_stdout_and_verbosity_is_put_back(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers.utils import logging as transformers_logging

    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    load_weights(find_model(folder), CPU)
    assert (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()) == before
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a gguf file at all", b"GGUF" + struct.pack("<IQQ", 3, 1, 9)])
def test_a_broken_gguf_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    refused(path, "GGUF", str(path))
    refused(tmp_path / "none.gguf", "does not exist")
