"""A prefill kept in a folder while it lasts, so that it goes on from its last finished layer if it was killed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ds_offload.calibration_file import Calibration
from ds_offload.config import OffloadConfig
from ds_offload.dtypes import QUANTISED_BITS, dtype_name
from ds_offload.errors import InputError, LoadError
from ds_offload.fingerprint import fingerprint
from ds_offload.kept_parts import kept_parts, restore_parts
from ds_offload.kv_context import KVContext
from ds_offload.notices import notice
from ds_offload.sealed_json import seal, unseal
from ds_offload.tensor_file import FileRecord, check_size, read_tensor, write_file, write_tensor

FORMAT = "ds_offload.prefill"
VERSION = 2
HEADER = "prefill.json"
# From the end of one write to the next, at the end of a layer.
EVERY_S = 10.0
# Tokens whose hidden states are written or read at a time.
_PART_TOKENS = 4096
_PATTERNS = tuple(f"{part}-*.safetensors" for part in ("layer", "labels", "window", "hidden"))
_REMEDY = "give --checkpoint another folder, or empty this one"


class CheckpointWriteError(OSError):
    """A checkpoint could not be written; the one before it, if any, is intact."""


@dataclass(frozen=True)
class PrefillIdentity:
    """What two prefills must share for one to take up the other's layers.

    Attributes:
        prompt: SHA-256 of the token ids.
        model: The model's fingerprint.
        dtype, kv_dtype: Of the model, and of stored K/V.
        rope: The model's RoPE.
        caches: What labels and codes of quantised K/V, which cannot be made again, were made
            with; empty where K/V are not quantised.
        tokens, layers: Of the prompt and of the model.
    """

    prompt: str
    model: str
    dtype: str
    kv_dtype: str
    rope: str
    caches: str
    tokens: int
    layers: int

    @classmethod
    def of(
        cls, ids: list[int], model: PreTrainedModel, config: OffloadConfig, calibration: Calibration | None = None
    ) -> PrefillIdentity:
        """The identity of a prompt's prefill by `model`; `config` is resolved, its K/V dtype chosen.

        Args:
            calibration: The model's, where K/V are quantised.
        """
        digest = hashlib.sha256(json.dumps(ids).encode()).hexdigest()
        rope = json.dumps(model.config.rope_parameters, sort_keys=True, default=str)
        kv_dtype = str(config.kv_dtype)
        layers = model.config.num_hidden_layers
        caches = ""
        if config.kv_dtype in QUANTISED_BITS:
            assert calibration is not None, "quantised K/V need one"
            caches = _caches(config, calibration)
        return cls(digest, fingerprint(model), dtype_name(model.dtype), kv_dtype, rope, caches, len(ids), layers)


def check_checkpoint_folder(folder: Path) -> None:
    """Make the folder of a checkpoint where there is none, and rid it of what a killed write left.

    Raises:
        InputError: It cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for pattern in (f".{HEADER}.tmp", *(f".{pattern}.tmp" for pattern in _PATTERNS)):
            for leftover in folder.glob(pattern):
                leftover.unlink()
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise InputError(
            f"cannot write to the checkpoint folder {folder}: {error.strerror}; give a folder you can write to"
        ) from None


class PrefillCheckpoint:
    """The finished layers' K/V, a file each, the hidden states behind the last of them, and a header.

    The header is written last, by renaming: what it names is there, whenever the process
    ends. Hidden states of the header before are removed behind that. Labels are made again
    from the K/V, but with quantised K/V, where labels and window are files of their own.

    Args:
        folder: Made if it is not there.

    Raises:
        InputError: It cannot be written to, or holds a checkpoint that is damaged or of another prefill.
    """

    def __init__(self, folder: str | Path, identity: PrefillIdentity) -> None:
        self._folder = Path(folder)
        self._identity = identity
        self._files: dict[str, FileRecord] = {}
        self._done = 0
        self._written = time.monotonic()
        check_checkpoint_folder(self._folder)
        if (self._folder / HEADER).exists():
            self._read_header()

    @classmethod
    def of(
        cls,
        folder: str | Path | None,
        prompts: list[list[int]],
        model: PreTrainedModel,
        config: OffloadConfig,
        calibration: Calibration | None = None,
    ) -> PrefillCheckpoint | None:
        """The checkpoint of the one prompt of a call, None without a folder; see `PrefillIdentity.of`.

        Raises:
            InputError: Several prompts, and as the class.
        """
        if folder is None:
            return None
        if not str(folder):
            raise InputError("checkpoint='' is empty; give a folder, or leave it out")
        if len(prompts) > 1:
            raise InputError(f"a checkpoint is of one prompt, and {len(prompts)} were given; leave checkpoint out")
        return cls(folder, PrefillIdentity.of(prompts[0], model, config, calibration))

    def resume(self, context: KVContext, sequence: int, hidden: Tensor) -> int:
        """Put what was kept into `context` and `hidden` `[T, hidden]`, where they lie, and say so.

        Returns:
            Finished layers; 0 where nothing was kept, and nothing was done then.

        Raises:
            InputError: A file is damaged.
        """
        if not self._done:
            return 0
        tokens, layers = self._identity.tokens, self._identity.layers
        notice(f"resuming the prefill at layer {self._done} of {layers} from {self._folder}")
        context.reserve(sequence, tokens)
        try:
            name = _hidden_name(self._done)
            parts = hidden.split(_PART_TOKENS)
            read_tensor(self._folder / name, self._files[name], hidden.dtype, tuple(hidden.shape), parts)
            for layer in range(self._done):
                self._restore(context, sequence, layer)
        except LoadError as error:
            raise LoadError(f"{error}; {_REMEDY}") from None
        return self._done

    def due(self) -> bool:
        """Whether the last write is long enough ago."""
        return time.monotonic() - self._written >= EVERY_S

    def save(self, context: KVContext, sequence: int, hidden: Tensor, done: int) -> None:
        """Keep the first `done` layers, which the device has finished, and the hidden states behind them.

        Raises:
            CheckpointWriteError: The disk is full, for one; the checkpoint before is intact.
        """
        before = _hidden_name(self._done)
        files = {name: record for name, record in self._files.items() if name != before}
        writing = self._folder
        try:
            if context.store.device.type == "cuda":
                # The writer's copies of the last layers are behind what the compute stream has done.
                torch.cuda.synchronize(context.store.device)
            for layer in range(self._done, done):
                for name, dtype, shape, parts in kept_parts(context, layer, sequence, self._identity.tokens):
                    writing = self._folder / _part_name(name, layer)
                    files[writing.name] = write_tensor(writing, dtype, shape, parts)
            writing = self._folder / _hidden_name(done)
            parts = iter(hidden.split(_PART_TOKENS))
            files[writing.name] = write_tensor(writing, hidden.dtype, tuple(hidden.shape), parts)
            writing = self._folder / HEADER
            write_file(writing, [self._header(files, done)])
        except OSError as error:
            self._remove_all_but(self._files)
            kept = f"the checkpoint of {self._done} layers before it is intact" if self._done else "nothing is kept"
            raise CheckpointWriteError(
                f"cannot write {writing}: {error.strerror}; {kept}; make room there or give --checkpoint another folder"
            ) from error
        self._files, self._done = files, done
        self._remove_all_but(files)
        self._written = time.monotonic()

    def delete(self) -> None:
        """Remove the checkpoint's files: the prefill is complete."""
        with contextlib.suppress(OSError):
            (self._folder / HEADER).unlink()
        self._files, self._done = {}, 0
        self._remove_all_but({})

    def _restore(self, context: KVContext, sequence: int, layer: int) -> None:
        tokens = self._identity.tokens
        for part, dtype, shape, parts in kept_parts(context, layer, sequence, tokens):
            name = _part_name(part, layer)
            read_tensor(self._folder / name, self._files[name], dtype, shape, parts)
        restore_parts(context, layer, sequence, tokens)

    def _header(self, files: dict[str, FileRecord], done: int) -> bytes:
        content: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "identity": asdict(self._identity),
            "done": done,
        }
        content["files"] = {name: asdict(record) for name, record in files.items()}
        return seal(content)

    def _read_header(self) -> None:
        path = self._folder / HEADER
        try:
            content = unseal(path.read_bytes())
            if content["format"] != FORMAT or content["version"] != VERSION:
                raise ValueError
            found = PrefillIdentity(**content["identity"])
            files = {name: FileRecord(**record) for name, record in content["files"].items()}
            done = int(content["done"])
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}; {_REMEDY}") from None
        except (ValueError, TypeError, KeyError, AttributeError):
            raise InputError(f"{path} is damaged, or of another version; {_REMEDY}") from None
        if found != self._identity:
            raise InputError(f"{self._folder} is the checkpoint of another {self._differences(found)}; {_REMEDY}")
        try:
            for name, record in files.items():
                check_size(self._folder / name, record)
        except LoadError as error:
            raise LoadError(f"{error}; {_REMEDY}") from None
        self._files, self._done = files, done

    def _differences(self, found: PrefillIdentity) -> str:
        """What of another prefill differs: "prompt (900 tokens, and this one has 901), kv_dtype (bf16, here fp32)"."""
        there, here = asdict(found), asdict(self._identity)
        named = []
        for field in ("prompt", "model", "dtype", "kv_dtype", "rope", "caches"):
            if there[field] != here[field]:
                pair = (there[field], here[field])
                if field == "prompt":
                    pair = (f"{found.tokens:,} tokens", f"{self._identity.tokens:,} tokens")
                elif field == "model":
                    pair = (f"fingerprint {found.model[:8]}", self._identity.model[:8])
                named.append(f"{field} ({pair[0]}, here {pair[1]})")
        return ", ".join(named)

    def _remove_all_but(self, kept: dict[str, FileRecord]) -> None:
        """Remove layers and hidden states that the header does not name."""
        for pattern in _PATTERNS:
            for file in self._folder.glob(pattern):
                if file.name not in kept:
                    with contextlib.suppress(OSError):
                        file.unlink()


def _caches(config: OffloadConfig, calibration: Calibration) -> str:
    """The settings of labels and window, and a digest of the calibration."""
    names = ("label_code", "label_bits", "label_channels", "sink_tokens", "recent_tokens")
    settings = ", ".join(f"{name}={getattr(config, name)}" for name in names)
    digest = hashlib.sha256()
    codes = calibration.codes.tensors() if calibration.codes is not None else ()
    for tensor in (calibration.channels, calibration.key_mean, calibration.key_factor, *codes):
        digest.update(tensor.contiguous().numpy().tobytes())
    return f"{settings}, calibration {digest.hexdigest()[:8]}"


def _part_name(part: str, layer: int) -> str:
    return f"{part}-{layer:04d}.safetensors"


def _hidden_name(done: int) -> str:
    return f"hidden-{done:04d}.safetensors"
