"""A prefill kept in a folder while it lasts, so that it goes on from its last finished layer if it was killed."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ds_offload.calibration_file import Calibration
from ds_offload.config import OffloadConfig
from ds_offload.errors import InputError, LoadError
from ds_offload.given_path import given_path
from ds_offload.kept_parts import kept_parts, restore_parts
from ds_offload.kv_context import KVContext
from ds_offload.notices import notice
from ds_offload.prefill_identity import PrefillIdentity
from ds_offload.sealed_json import seal, unseal
from ds_offload.session_place import HEADER as SESSION_HEADER
from ds_offload.tensor_file import FileRecord, check_size, read_tensor, write_file, write_tensor

FORMAT = "ds_offload.prefill"
VERSION = 3
HEADER = "prefill.json"
# From the end of one write to the next, at the end of a layer.
EVERY_S = 10.0
# Tokens whose hidden states are written or read at a time.
_PART_TOKENS = 4096
# What looks like a checkpoint's file, and what is named as one.
_ALIKE = re.compile(r"(layer|labels|window|hidden)-.*\.safetensors")
_NAMED = re.compile(r"(layer|labels|window|hidden)-\d{4,}\.safetensors")
_OTHER_FOLDER = "give --checkpoint a folder of its own"
_REMEDY = "give --checkpoint another folder, or empty this one"


class CheckpointWriteError(OSError):
    """A checkpoint could not be written; the one before it, if any, is intact."""


def check_checkpoint_folder(folder: Path) -> None:
    """Make the folder of a checkpoint where there is none.

    Raises:
        InputError: It cannot be written to, or holds files of something else, which a checkpoint would replace.
    """
    try:
        if (folder / SESSION_HEADER).exists():
            raise InputError(f"{folder} is a saved session; {_OTHER_FOLDER}")
        folder.mkdir(parents=True, exist_ok=True)
        names = os.listdir(folder)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise InputError(
            f"cannot write to the checkpoint folder {folder}: {error.strerror}; give a folder you can write to"
        ) from None
    alike = sorted(filter(_ALIKE.fullmatch, names))
    if alike and HEADER not in names:
        raise InputError(f"{folder} holds {alike[0]} and no {HEADER}, so it is no checkpoint; {_OTHER_FOLDER}")


class PrefillCheckpoint:
    """The finished layers' K/V, a file each, the hidden states behind the last of them, and a header.

    The header is written last, by renaming: what it names is there, whenever the process
    ends. Another before it says which files are being written, so that the next process
    removes what a killed one left, and nothing else. Hidden states of the header before are
    removed behind the last. Labels are made again from the K/V, but with quantised K/V, where
    labels and window are files of their own.

    Args:
        folder: Made if it is not there.

    Raises:
        InputError: It cannot be written to, or holds a checkpoint that is damaged or of another prefill, or files
            that are no checkpoint's.
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
            InputError: Several prompts, no path, and as the class.
        """
        if folder is None:
            return None
        folder = given_path(folder, "checkpoint")
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
        tokens = self._identity.tokens
        before = _hidden_name(self._done)
        files = {name: record for name, record in self._files.items() if name != before}
        replaced = self._files.keys() - files.keys()
        parts = [
            (_part_name(part.name, layer), part)
            for layer in range(self._done, done)
            for part in kept_parts(context, layer, sequence, tokens)
        ]
        new = [*(name for name, _ in parts), _hidden_name(done)]
        header = writing = self._folder / HEADER
        try:
            if context.store.device.type == "cuda":
                # The writer's copies of the last layers are behind what the compute stream has done.
                torch.cuda.synchronize(context.store.device)
            write_file(header, [self._header(self._files, self._done, new)])
            for name, part in parts:
                writing = self._folder / name
                files[name] = write_tensor(writing, part.dtype, part.shape, part.parts)
            writing = self._folder / new[-1]
            files[new[-1]] = write_tensor(writing, hidden.dtype, tuple(hidden.shape), hidden.split(_PART_TOKENS))
            writing = header
            write_file(header, [self._header(files, done, replaced)])
        except OSError as error:
            self._remove(new if self._done else [*new, HEADER])
            kept = f"the checkpoint of {self._done} layers before it is intact" if self._done else "nothing is kept"
            raise CheckpointWriteError(
                f"cannot write {writing}: {error.strerror}; {kept}; make room there or give --checkpoint another folder"
            ) from error
        self._files, self._done = files, done
        self._remove(replaced)
        self._written = time.monotonic()

    def delete(self) -> None:
        """Remove the checkpoint's files: the prefill is complete."""
        if self._files:
            with contextlib.suppress(OSError):
                # A process that is killed from here on leaves what the next one removes.
                write_file(self._folder / HEADER, [self._header({}, 0, self._files)])
        self._remove([*self._files, HEADER, f".{HEADER}.tmp"])
        self._files, self._done = {}, 0

    def _restore(self, context: KVContext, sequence: int, layer: int) -> None:
        tokens = self._identity.tokens
        for part, dtype, shape, parts in kept_parts(context, layer, sequence, tokens):
            name = _part_name(part, layer)
            read_tensor(self._folder / name, self._files[name], dtype, shape, parts)
        restore_parts(context, layer, sequence, tokens)

    def _header(self, files: dict[str, FileRecord], done: int, stray: Iterable[str]) -> bytes:
        """What is kept, and names of files beside it that a process leaves if it is killed now."""
        content: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "identity": asdict(self._identity),
            "done": done,
            "stray": sorted(stray),
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
            done, stray = int(content["done"]), list(content["stray"])
            if not all(_NAMED.fullmatch(name) for name in (*files, *stray)):
                raise ValueError
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}; {_REMEDY}") from None
        except (ValueError, TypeError, KeyError, AttributeError):
            raise InputError(f"{path} is damaged, or of another version; {_REMEDY}") from None
        # One that was killed in its first write has kept nothing.
        if done and found != self._identity:
            raise InputError(
                f"{self._folder} is the checkpoint of another {self._identity.differences(found)}; {_REMEDY}"
            )
        try:
            for name, record in files.items():
                check_size(self._folder / name, record)
        except LoadError as error:
            raise LoadError(f"{error}; {_REMEDY}") from None
        self._files, self._done = files, done
        self._remove([left for name in stray if name not in files for left in (name, f".{name}.tmp")])

    def _remove(self, names: Iterable[str]) -> None:
        for name in names:
            with contextlib.suppress(OSError):
                (self._folder / name).unlink()


def _part_name(part: str, layer: int) -> str:
    return f"{part}-{layer:04d}.safetensors"


def _hidden_name(done: int) -> str:
    return f"hidden-{done:04d}.safetensors"
