"""The calibration of a model and the file it is kept in."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ds_offload.errors import InputError, LoadError
from ds_offload.kernels.product_code import ProductCode
from ds_offload.label_mass import SHARES
from ds_offload.reference_channels import looks_like_json

FORMAT = "ds_offload.calibration"
VERSION = 4
REMEDY = "make one with: ds-offload calibrate --model M"

# The oldest version that is read. Files of version 2 have no codes, those of version 3 no masses.
_OLDEST = 2
_LARGEST_FILE = 2**30
_STATISTICS = ("importance", "key_mean", "key_factor")
_CODE = ("mean", "basis", "turn", "words")
_MASS = "label_mass"


@dataclass(frozen=True)
class Calibration:
    """What calibration found out about a model's keys; tensors are on the CPU.

    Attributes:
        channels: Channel numbers `[L, Hkv, D]` int64, the most important first.
        importance: Importance by channel number `[L, Hkv, D]` float32.
        key_mean: Mean key after RoPE `[L, Hkv, D]` float32, subtracted before labels are
            quantised; zeros where it is not known.
        key_factor: What the channels of keys are divided by before they are quantised for the
            store, `[L, Hkv, D]` float32, positive; ones where it is not known.
        codes: The product codes of labels; None where they are not known.
        label_mass: Exact attention `[L, len(SHARES)]` float32 of tokens that product codes choose, by
            the share that they promise (`ds_offload/label_mass.py`); None where it is not known.
        fingerprint: The model it was made for.
        tokens: Tokens it was made on.
        text: Name of the text they are from.
    """

    channels: Tensor
    importance: Tensor
    key_mean: Tensor
    key_factor: Tensor
    codes: ProductCode | None
    label_mass: Tensor | None
    fingerprint: str
    tokens: int
    text: str

    @classmethod
    def rank(
        cls,
        importance: Tensor,
        key_mean: Tensor,
        key_factor: Tensor | None = None,
        codes: ProductCode | None = None,
        label_mass: Tensor | None = None,
        *,
        fingerprint: str,
        tokens: int,
        text: str,
    ) -> Calibration:
        """The calibration with channels ranked by `importance`, ties by channel number; factors are 1 without any."""
        importance = importance.float().cpu()
        channels = importance.sort(dim=-1, descending=True, stable=True).indices
        factor = torch.ones_like(importance) if key_factor is None else key_factor.float().cpu()
        return cls(channels, importance, key_mean.float().cpu(), factor, codes, label_mass, fingerprint, tokens, text)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file in one step: it is there whole or not at all.

        The same calibration always gives the same bytes.

        Raises:
            InputError: `path` cannot be written.
        """
        check_writable(path)
        path = Path(path)
        temporary = path.with_name(f".calibration-{secrets.token_hex(8)}.tmp")
        try:
            with open(temporary, "xb") as file:
                file.write(self.to_bytes())
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror}; give a path in a folder you can write") from None
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()

    def to_bytes(self) -> bytes:
        """The content of the file that `save` writes."""
        metadata = {
            "format": FORMAT,
            "version": str(VERSION),
            "fingerprint": self.fingerprint,
            "tokens": str(self.tokens),
            "text": self.text.encode(errors="replace").decode(),
        }
        tensors = {"channels": self.channels} | {name: getattr(self, name) for name in _STATISTICS}
        if self.codes is not None:
            tensors |= {f"code_{name}": getattr(self.codes, name) for name in _CODE}
        if self.label_mass is not None:
            tensors[_MASS] = self.label_mass
        data = safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata)
        # safetensors writes metadata in an order of its own each time: sort the header.
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.dumps(json.loads(data[8:start]), sort_keys=True, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        return len(header).to_bytes(8, "little") + header + data[start:]

    @classmethod
    def load(cls, path: str | Path, fingerprint: str) -> Calibration:
        """Read a file that `save` wrote, for the model with `fingerprint`.

        Raises:
            LoadError: Not there, truncated, damaged, foreign, of a newer version or of
                another model.
        """
        return cls.parse(read_calibration_file(path), str(path), fingerprint)

    @classmethod
    def parse(cls, data: bytes, name: str, fingerprint: str) -> Calibration:
        """`load` from a file's content; errors call it `name`."""
        try:
            tensors = safetensors.torch.load(data)
        except (SafetensorError, KeyError, ValueError):
            raise LoadError(f"{name} is no calibration, or is cut short or damaged; {REMEDY}") from None
        header: dict[str, Any] = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        metadata: dict[str, str] = header.get("__metadata__") or {}
        if metadata.get("format") != FORMAT:
            raise LoadError(f"{name} is a safetensors file, but no calibration; {REMEDY}")
        damaged = LoadError(f"{name} is a damaged calibration; {REMEDY}")
        version, tokens, made_for = (metadata.get(key, "") for key in ("version", "tokens", "fingerprint"))
        if not all(re.fullmatch(r"[0-9]{1,18}", number) for number in (version, tokens)):
            raise damaged
        if int(version) > VERSION:
            raise LoadError(
                f"{name} has format version {version}, and this version of ds-offload reads up to {VERSION}; "
                f"update ds-offload, or {REMEDY}"
            )
        if int(version) < _OLDEST:
            raise LoadError(f"{name} has format version {version}, of an older ds-offload; {REMEDY}")
        if made_for != fingerprint:
            raise LoadError(
                f"{name}: this calibration was made for another model "
                f"(fingerprint {made_for[:8]!a} ≠ {fingerprint[:8]!a}); {REMEDY}"
            )
        coded = {f"code_{name}" for name in _CODE} & set(tensors)
        if set(tensors) - coded - {_MASS} != {"channels", *_STATISTICS}:
            raise damaged
        found = [tensors[name] for name in _STATISTICS]
        sound = all(
            value.dtype == torch.float32
            and value.ndim == 3
            and value.shape == found[0].shape
            and bool(value.isfinite().all())
            for value in found
        )
        if not sound or not bool((tensors["key_factor"] > 0).all()):
            raise damaged
        codes = _read_codes(tensors, found[0].shape, damaged) if coded else None
        mass = tensors.get(_MASS)
        if mass is not None and not _is_mass(mass, found[0].shape[0]):
            raise damaged
        about: dict[str, Any] = {"tokens": int(tokens), "text": metadata.get("text", "")}
        loaded = cls.rank(found[0], found[1], found[2], codes, mass, fingerprint=fingerprint, **about)
        channels = tensors["channels"]
        if channels.dtype != torch.int64 or not torch.equal(loaded.channels, channels):
            raise damaged
        return loaded


def _is_mass(mass: Tensor, layers: int) -> bool:
    sound = mass.dtype == torch.float32 and mass.shape == (layers, len(SHARES))
    # Rounding may leave a sum of weights above 1.
    return sound and bool(((mass >= 0) & (mass < 1.001)).all())


def _read_codes(tensors: dict[str, Tensor], heads: torch.Size, damaged: LoadError) -> ProductCode:
    """The codes in a file for heads `[L, Hkv, D]`; raises `damaged` where they are not sound."""
    found = [tensors.get(f"code_{name}") for name in _CODE]
    given = [value for value in found if value is not None and value.dtype == torch.float32]
    if len(given) != len(_CODE) or given[0].shape != heads or not all(bool(value.isfinite().all()) for value in given):
        raise damaged
    try:
        return ProductCode(*given)
    except ValueError:
        raise damaged from None


def check_writable(path: str | Path) -> None:
    """Refuse a path that `Calibration.save` could not write to.

    Raises:
        InputError: Something other than a file is there, its folder is missing or not writable, or its name too long.
    """
    folder = Path(path).parent
    if os.path.exists(path) and not os.path.isfile(path):
        raise InputError(f"cannot write {path}: it is not a regular file; give another path")
    if not os.path.isdir(folder):
        raise InputError(f"cannot write {path}: there is no folder {folder}; make it, or give another path")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"cannot write {path}: the folder {folder} is not writable; give another path")
    try:
        os.lstat(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; give another path") from None


def check_replaceable(path: str) -> None:
    """Refuse a path that a user named for a calibration if it cannot be written, or a file of another kind is there.

    Raises:
        InputError: As `check_writable`, or such a file.
    """
    check_writable(path)
    if not os.path.exists(path):
        return
    try:
        with open(path, "rb") as file:
            start = file.read(2**20)
    except OSError as error:
        raise InputError(f"cannot read {path}, which is there: {error.strerror}; give another path") from None
    if start and _made_as(start) != FORMAT:
        raise InputError(f"{path} is there and is no calibration, so it is not replaced; give another path")


def has_codes(path: str | None) -> bool:
    """Whether the calibration in a file, None for one that is found or made, has product codes.

    False of a file that is no calibration, too: loading it says so.
    """
    if path is None:
        return True
    try:
        data = read_calibration_file(os.path.expanduser(path))
        return "code_words" in json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (LoadError, ValueError, TypeError, RecursionError):
        # JSON that is no object, or too deep to be read: neither is what safetensors begin with.
        return False


def check_calibration(path: str) -> None:
    """Refuse a file that a user named as a calibration and that is none; its tensors are not looked at.

    Raises:
        LoadError: It cannot be read, or is neither a calibration nor a channel file.
    """
    data = read_calibration_file(os.path.expanduser(path))
    if path.lower().endswith(".json") or looks_like_json(data):
        return
    if _made_as(data) != FORMAT:
        raise LoadError(f"{path} is no calibration, or is cut short or damaged; {REMEDY}")


def _made_as(data: bytes) -> Any:
    """The format that the header of a safetensors file names; None where there is none."""
    try:
        return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["format"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def read_calibration_file(path: str | Path) -> bytes:
    """The content of a file that a user named as a calibration.

    Raises:
        LoadError: Not there, not a file, not readable, or far larger than any calibration.
    """
    try:
        about = os.stat(path)
        data = Path(path).read_bytes() if stat.S_ISREG(about.st_mode) and about.st_size <= _LARGEST_FILE else None
    except FileNotFoundError:
        raise LoadError(f"there is no calibration {path}; {REMEDY}") from None
    except (OSError, ValueError) as error:
        raise LoadError(f"cannot read the calibration {path}: {error}; {REMEDY}") from None
    if data is None:
        seen = f"has {about.st_size:,} bytes" if stat.S_ISREG(about.st_mode) else "is not a file"
        raise LoadError(f"{path} {seen}, so it is no calibration; {REMEDY}")
    return data
