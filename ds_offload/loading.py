"""Finds a model by what the user wrote, and loads its weights."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ds_offload.adapter import change_config, merge_adapter
from ds_offload.aliases import ALIASES, LONG_MODEL, SHIPPED_MODELS
from ds_offload.byte_tokenizer import BYTES, ByteTokenizer
from ds_offload.checkpoint_folder import one_line, read_config, read_tokenizer, stored_dtype, weight_files
from ds_offload.default_model import default_model_folder
from ds_offload.dtypes import DTYPES
from ds_offload.dummy_weights import build_dummy
from ds_offload.errors import InputError, LoadError
from ds_offload.families import check_family
from ds_offload.fingerprint import fingerprint
from ds_offload.gguf_file import load_gguf_weights, read_gguf_config, read_gguf_tokenizer
from ds_offload.gguf_rope import take_rope_scaling
from ds_offload.hub import THREE_WAYS, hub_folder, is_hub_id
from ds_offload.model_shape import ModelShape
from ds_offload.notices import warn
from ds_offload.quiet_transformers import quiet_transformers
from ds_offload.rope_scaling import apply_rope_scaling

# What makes the default model the long one.
ADAPTER = Path(__file__).parent / "data" / LONG_MODEL


@dataclass(frozen=True)
class ModelSource:
    """A model that was found; its weights are not loaded.

    Attributes:
        name: What the user wrote.
        location: Folder, hub id or .gguf path that the weights come from; "" for dummy weights.
        load_format: "auto" or "dummy".
        config: The checkpoint's config, with the user's RoPE scaling applied.
        shape: Its sizes.
        dtype: What the weights will be loaded as.
        adapter: Folder of an adapter that is merged into the weights.
    """

    name: str
    location: str
    load_format: str
    config: PreTrainedConfig
    shape: ModelShape
    dtype: torch.dtype
    adapter: Path | None = None


@dataclass
class LoadedModel:
    """A model ready to run.

    Attributes:
        model: In eval mode on `device`, without gradients.
        tokenizer: None where the checkpoint has none: then only token ids work.
        device: Where all parameters are.
        eos_token_ids: From the generation config, else the config; empty for dummy weights.
        fingerprint: What a calibration belongs to; see `ds_offload.fingerprint`.
    """

    source: ModelSource
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | ByteTokenizer | None
    device: torch.device
    eos_token_ids: frozenset[int]
    fingerprint: str


def _looks_like_path(name: str) -> bool:
    return name.startswith((os.sep, "./", "../", "~")) or name.endswith(".gguf") or os.path.exists(name)


def _config_in_folder(folder: Path, name: str) -> PreTrainedConfig:
    check_family(name, read_config(folder))
    try:
        return AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise LoadError(f"{folder / 'config.json'} cannot be read: {one_line(error)}") from error


def _locate(name: str, dummy: bool) -> tuple[str, PreTrainedConfig]:
    """Location and config of what the user wrote. A dummy alias never touches disk or network."""
    if _looks_like_path(name):
        path = Path(os.path.expanduser(name))
        if path.suffix == ".gguf":
            config = read_gguf_config(path)
            check_family(name, config.to_dict())
            take_rope_scaling(config, path)
            return str(path), config
        if not path.is_dir():
            raise LoadError(f"model {name!r} {'is a file' if path.is_file() else 'does not exist'}; {THREE_WAYS}")
        config = _config_in_folder(path, name)
        if not dummy:
            weight_files(path)
        return str(path), config
    alias = ALIASES.get(name)
    if alias is not None and dummy:
        return "", alias.config()
    if name in SHIPPED_MODELS:
        folder = default_model_folder()
        config = _config_in_folder(folder, name)
        if name == LONG_MODEL:
            change_config(config, ADAPTER)
        return str(folder), config
    hub_id = alias.hub_id if alias is not None else name
    if not is_hub_id(hub_id):
        raise LoadError(f"model {name!r} is not known; {THREE_WAYS} (aliases: {', '.join(ALIASES)})")
    hint = f"; --load-format dummy runs {name} on random weights, for benchmarks" if alias is not None else ""
    return hub_id, _config_in_folder(hub_folder(hub_id, name=name, weights=False, hint=hint), name)


def _own_dtype(location: str, config: PreTrainedConfig) -> torch.dtype:
    """The dtype that transformers loads the checkpoint as by default."""
    if location.endswith(".gguf"):
        return torch.float32
    stated = config.dtype
    if isinstance(stated, str):
        stated = getattr(torch, stated, None)
    if stated is None:
        if not Path(location).is_dir():
            raise InputError(f"the config of {location} states no dtype; give --dtype, one of {', '.join(DTYPES)}")
        stated = stored_dtype(weight_files(Path(location))[0])
    return stated


def find_model(
    name: str | os.PathLike[str],
    *,
    load_format: str = "auto",
    dtype: str = "auto",
    rope_scaling: str | None = None,
) -> ModelSource:
    """Find a model and read its config; no weights are loaded.

    Args:
        name: A folder, a .gguf file, an alias or a hub id (org/name), tried in this order.
        load_format: "auto", or "dummy" for random weights of the model's shape.
        dtype: "auto" (the checkpoint's own, bf16 for dummy weights), "fp32", "bf16" or "fp16".
        rope_scaling: Replaces the config's RoPE scaling: "linear:4", "dynamic", "yarn:4".

    Raises:
        LoadError: Nothing by that name, or files that are broken or missing.
        InputError: A model family or an argument that is not supported.
    """
    if not isinstance(name, str | os.PathLike):
        raise InputError(f"the model's name is {name!r:.60}, which is no text; {THREE_WAYS}")
    name = os.fspath(name)
    if not name.strip():
        raise InputError(f"the model's name is empty; {THREE_WAYS}")
    if load_format not in ("auto", "dummy"):
        raise InputError(f"load_format={load_format!r} must be one of auto, dummy")
    if dtype != "auto" and dtype not in DTYPES:
        raise InputError(f"dtype={dtype!r} must be one of auto, {', '.join(DTYPES)}")
    dummy = load_format == "dummy"
    with quiet_transformers():
        location, config = _locate(name, dummy)
        config.name_or_path = name
        if getattr(config, "head_dim", 0) is None:
            # Mixtral's config leaves it open, and the yarn and dynamic RoPE of transformers then fail.
            config.head_dim = config.hidden_size // config.num_attention_heads
        if rope_scaling is not None:
            apply_rope_scaling(config, rope_scaling)
        if dtype != "auto":
            chosen = DTYPES[dtype]
        elif dummy:
            chosen = torch.bfloat16
        else:
            chosen = _own_dtype(location, config)
        if chosen not in DTYPES.values():
            raise InputError(f"{name} is stored as {chosen}; give --dtype, one of {', '.join(DTYPES)}")
        config.dtype = chosen
        try:
            shape = ModelShape.from_config(config)
        except Exception as error:
            raise LoadError(f"the config of {name} describes no sound model: {one_line(error)}") from error
    adapted = name == LONG_MODEL and not dummy and not _looks_like_path(name)
    return ModelSource(
        name, "" if dummy else location, load_format, config, shape, chosen, ADAPTER if adapted else None
    )


def _load_folder(folder: Path, source: ModelSource) -> tuple[PreTrainedModel, dict[str, Any]]:
    weight_files(folder)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(folder),
            config=source.config,
            dtype=source.dtype,
            attn_implementation="sdpa",
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:
        raise LoadError(f"the weights in {folder} cannot be loaded: {one_line(error)}") from error
    return loaded


def _check_complete(source: ModelSource, info: dict[str, Any]) -> None:
    """Refuse a checkpoint that lacks weights, and name weights that the model has no place for."""
    missing = set(info["missing_keys"])
    if missing:
        raise LoadError(
            f"the checkpoint of {source.name} lacks {len(missing)} weights, such as {min(missing)}; "
            "give the checkpoint of a causal language model"
        )
    unused = {name for name in info["unexpected_keys"] if not name.endswith("rotary_emb.inv_freq")}
    if unused:
        warn(f"the checkpoint of {source.name} holds {len(unused)} weights that go unused, such as {min(unused)}")


def _eos_token_ids(model: PreTrainedModel) -> frozenset[int]:
    ids = model.generation_config.eos_token_id if model.generation_config is not None else None
    if ids is None:
        ids = model.config.eos_token_id
    if ids is None:
        return frozenset()
    return frozenset([ids] if isinstance(ids, int) else ids)


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase | ByteTokenizer | None:
    """The tokenizer of a found model, without its weights; None where the checkpoint has none.

    Raises:
        LoadError: A tokenizer file that is broken.
    """
    if source.load_format == "dummy":
        return ByteTokenizer(source.shape.vocab_size) if source.shape.vocab_size >= BYTES else None
    with quiet_transformers():
        if source.location.endswith(".gguf"):
            return read_gguf_tokenizer(Path(source.location), source.config)
        tokenizer = read_tokenizer(_checkpoint_folder(source))
        if source.adapter is not None and tokenizer is not None:
            tokenizer.model_max_length = source.config.max_position_embeddings
        return tokenizer


def _checkpoint_folder(source: ModelSource) -> Path:
    folder = Path(source.location)
    return folder if folder.is_dir() else hub_folder(source.location, name=source.name, weights=True)


def load_weights(
    source: ModelSource, device: torch.device, tokenizer: PreTrainedTokenizerBase | ByteTokenizer | None = None
) -> LoadedModel:
    """Load a found model's weights onto `device`, read from safetensors or GGUF, or made up for dummy.

    `tokenizer` is the source's own if it was loaded before, and loaded here otherwise.

    Raises:
        LoadError: Weights or a tokenizer that are missing, truncated or of another model.
    """
    tokenizer = tokenizer if tokenizer is not None else load_tokenizer(source)
    with quiet_transformers():
        if source.load_format == "dummy":
            model = build_dummy(source.config, source.dtype, device)
            return LoadedModel(source, model, tokenizer, model.device, frozenset(), fingerprint(model))
        if source.location.endswith(".gguf"):
            model, info = load_gguf_weights(Path(source.location), source.config, source.dtype)
        else:
            model, info = _load_folder(_checkpoint_folder(source), source)
        _check_complete(source, info)
        if source.adapter is not None:
            merge_adapter(model, source.adapter)
    # On the CPU first: transformers places weights on a device by itself only with accelerate.
    model.to(device)  # type: ignore[arg-type]  # transformers wraps it, and the wrapper hides its signature
    model.eval().requires_grad_(False)
    model.config.name_or_path = source.name
    return LoadedModel(source, model, tokenizer, model.device, _eos_token_ids(model), fingerprint(model))
