"""A local folder of safetensors, as transformers saves it: what is in it, checked before weights load."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ds_offload.errors import LoadError

PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


def one_line(error: BaseException) -> str:
    """An error's message without line breaks, for a line that says more around it."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}..."


def read_config(folder: Path) -> dict:
    """The folder's config.json.

    Raises:
        LoadError: No such folder or file, or a file that holds no JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise LoadError(f"{folder} has no config.json; give a folder that holds config.json and model.safetensors")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LoadError(f"{path} cannot be read: {one_line(error)}; fetch the file again") from error
    if not isinstance(fields, dict):
        raise LoadError(f"{path} holds no JSON object; fetch the file again")
    return fields


def weight_files(folder: Path) -> list[Path]:
    """The folder's safetensors, one or the shards that its index names.

    Raises:
        LoadError: None there, pickled weights only, an adapter, or a shard that is missing.
    """
    if (folder / "adapter_config.json").is_file():
        raise LoadError(f"{folder} holds an adapter (adapter_config.json); merge it into its model first")
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            if not names or not all(isinstance(name, str) for name in names):
                raise ValueError("its weight_map names no files")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise LoadError(f"{index} cannot be read: {one_line(error)}; fetch the file again") from error
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise LoadError(f"{folder} lacks {missing[0]}, which its index names; fetch the file again")
        return [folder / name for name in names]
    pickled = sorted(path.name for pattern in PICKLED for path in folder.glob(pattern))
    if pickled:
        raise LoadError(
            f"{folder} holds only pickled weights ({pickled[0]}); weights are read from safetensors or GGUF only, "
            "so convert them to model.safetensors"
        )
    gguf = sorted(folder.glob("*.gguf"))
    if gguf:
        raise LoadError(f"{folder} has no model.safetensors; to use {gguf[0].name}, give that file's path")
    raise LoadError(f"{folder} has no model.safetensors; give a folder that holds the weights")


def stored_dtype(file: Path) -> torch.dtype:
    """dtype of the first floating-point tensor of a safetensors file, read from its header.

    Raises:
        LoadError: The file is truncated or no safetensors file.
    """
    try:
        with open(file, "rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            if not 0 < size <= file.stat().st_size - 8:
                raise ValueError("its header is longer than the file")
            header = json.loads(stream.read(size))
        dtypes = [_DTYPES.get(entry["dtype"]) for name, entry in header.items() if name != "__metadata__"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LoadError(f"{file} is no sound safetensors file: {one_line(error)}; fetch the file again") from error
    found = next((dtype for dtype in dtypes if dtype is not None), None)
    if found is None:
        raise LoadError(f"{file} holds no floating-point weights; give a folder of a bf16, fp16 or fp32 checkpoint")
    return found


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The folder's tokenizer, or None where it has none.

    Raises:
        LoadError: Tokenizer files that cannot be read.
    """
    if not any((folder / name).is_file() for name in VOCABULARIES):
        if (folder / "tokenizer_config.json").is_file():
            raise LoadError(
                f"{folder} has tokenizer_config.json but no vocabulary; fetch tokenizer.json or tokenizer.model too, "
                "or delete tokenizer_config.json to work with token ids"
            )
        return None
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise LoadError(f"the tokenizer in {folder} cannot be read: {one_line(error)}") from error
