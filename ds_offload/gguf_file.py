"""A .gguf file: config, weights and tokenizer as transformers reads them, blocks unpacked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_gguf_pytorch_utils import TensorProcessor, get_gguf_hf_weights_map, load_gguf_checkpoint

from ds_offload.checkpoint_folder import one_line
from ds_offload.errors import LoadError
from ds_offload.gguf_header import FREQUENCY_FACTORS, read_gguf_header
from ds_offload.model_shape import build_on_meta


def _unreadable(path: Path, error: Exception) -> LoadError:
    return LoadError(f"{path} cannot be read as GGUF: {one_line(error)}; give a whole .gguf file")


def read_gguf_config(path: Path) -> PreTrainedConfig:
    """The config that the file's metadata states.

    Raises:
        LoadError: No such file, or no GGUF of an architecture that transformers reads.
    """
    if not path.is_file():
        raise LoadError(f"{path} does not exist; give the path of a .gguf file")
    try:
        return AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name, local_files_only=True)
    except Exception as error:
        raise _unreadable(path, error) from error


def load_gguf_weights(
    path: Path, config: PreTrainedConfig, dtype: torch.dtype
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model on the CPU with its blocks unpacked to `dtype`, and the loading info of transformers.

    `from_pretrained(gguf_file=...)` asks for accelerate; the two steps it takes do not.

    Raises:
        LoadError: A truncated file, or blocks of a kind that cannot be unpacked.
    """
    skeleton = build_on_meta(config, dtype)
    try:
        tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=skeleton, torch_dtype=dtype)
        loaded: Any = type(skeleton).from_pretrained(
            None,
            config=config,
            state_dict=tensors["tensors"],
            dtype=dtype,
            attn_implementation="sdpa",
            output_loading_info=True,
        )
        # transformers passes over tensors that the model has no place for, and does not say so.
        taken = get_gguf_hf_weights_map(skeleton, TensorProcessor())
        unused = read_gguf_header(path).tensors - set(taken) - {FREQUENCY_FACTORS}
    except Exception as error:
        raise _unreadable(path, error) from error
    model, info = loaded
    return model, info | {"unexpected_keys": [*info["unexpected_keys"], *unused]}


def read_gguf_tokenizer(path: Path, config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    """The file's tokenizer, with the end-of-sequence token that its metadata states.

    Some versions of transformers leave the class's default there.

    Raises:
        LoadError: A vocabulary that cannot be read.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name, local_files_only=True)
    except Exception as error:
        raise _unreadable(path, error) from error
    if isinstance(config.eos_token_id, int):
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(config.eos_token_id)
    return tokenizer
