"""Checkpoints of the Hugging Face hub, as local folders in its own cache."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from ds_offload.checkpoint_folder import one_line
from ds_offload.errors import LoadError

CONFIG_FILES = ["config.json", "generation_config.json"]
ALL_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "tokenizer.model"]
# Copies of the weights in other layouts, which would be downloaded for nothing.
LEFT_OUT = ["*/*", "consolidated*"]

THREE_WAYS = "give a local folder of safetensors, a .gguf file, or a hub id or alias with network access to the hub"


def is_hub_id(name: str) -> bool:
    """Whether the name has the form org/name."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None


def hub_folder(hub_id: str, *, name: str, weights: bool, hint: str = "") -> Path:
    """The checkpoint's folder in the hub's cache, downloaded where it is not there yet.

    Args:
        hub_id: org/name.
        name: The model as the user wrote it, for the error.
        weights: All that is needed to run, or only the config.
        hint: What else would help, added to the error.

    Raises:
        LoadError: No network, no such repository, no access to it, or no room for it.
    """
    patterns = ALL_FILES if weights else CONFIG_FILES
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns, ignore_patterns=LEFT_OUT))
    except Exception as error:
        if isinstance(error, GatedRepoError):
            reason = f"access to {hub_id} must be granted on the hub, and HF_TOKEN set"
        elif isinstance(error, RepositoryNotFoundError):
            reason = f"the hub has no {hub_id}, or it is private and HF_TOKEN is not set"
        else:
            reason = f"{hub_id} could not be fetched from the hub ({one_line(error.__cause__ or error)})"
        raise LoadError(f"no weights to be had for {name}: {reason}; {THREE_WAYS}{hint}") from error
