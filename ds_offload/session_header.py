"""What a saved session says of itself: whose it is, its tokens, and its files with their checksums."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ds_offload.calibration import Calibration
from ds_offload.config import OffloadConfig
from ds_offload.document_prompt import DocumentPrompt
from ds_offload.dtypes import QUANTISED_BITS, dtype_name
from ds_offload.errors import InputError, LoadError
from ds_offload.loading import LoadedModel
from ds_offload.sealed_json import seal, unseal
from ds_offload.session_place import HEADER
from ds_offload.tensor_file import FileRecord, check_size

FORMAT = "ds_offload.session"
VERSION = 3
# Where a file is damaged.
REMEDY = "read the document again"


@dataclass(frozen=True)
class SessionIdentity:
    """What a session and who loads it must share.

    Attributes:
        model, tokenizer: Fingerprints.
        dtype, kv_dtype: Of the model, and of stored K/V.
        rope: The model's RoPE.
        label_channels, label_bits, label_code: The code of labels.
        dense_layers: Layers that have no labels.
        window: Sinks and recent tokens, which quantised K/V keep as they are; "any" with others.
        chat_template: Fingerprint of what puts questions behind a text; "none" without one.
    """

    model: str
    tokenizer: str
    dtype: str
    kv_dtype: str
    rope: str
    label_channels: int
    label_bits: int | None
    dense_layers: list[int]
    window: str = "any"
    # Sessions saved before there was another one do not say it.
    label_code: str = "scalar"
    # Those of version 2 and before do not say it, either; they are believed.
    chat_template: str = ""

    @classmethod
    def of(cls, loaded: LoadedModel, config: OffloadConfig) -> SessionIdentity:
        """The identity of sessions of a model; `config` is resolved."""
        assert config.label_channels is not None, "the config is resolved"
        return cls(
            model=loaded.fingerprint,
            tokenizer=tokenizer_fingerprint(loaded.tokenizer),
            dtype=dtype_name(loaded.model.dtype),
            kv_dtype=dtype_name(loaded.model.dtype) if config.kv_dtype == "auto" else config.kv_dtype,
            rope=json.dumps(loaded.model.config.rope_parameters, sort_keys=True, default=str),
            label_channels=config.label_channels,
            label_bits=config.label_bits,
            dense_layers=list(config.dense_layers),
            window=f"sink_tokens={config.sink_tokens}, recent_tokens={config.recent_tokens}"
            if config.kv_dtype in QUANTISED_BITS
            else "any",
            label_code=config.label_code,
            chat_template=template_fingerprint(loaded.tokenizer),
        )

    @property
    def quantised(self) -> bool:
        """Whether stored K/V are."""
        return self.kv_dtype in QUANTISED_BITS

    def differences(self, here: SessionIdentity) -> str:
        """What differs: "model (fingerprint 01234567, here 89abcdef), kv_dtype (bf16, here fp32)"; "" where nothing."""
        mine, others = asdict(self), asdict(here)
        if not self.chat_template:
            others["chat_template"] = ""
        for prints in (mine, others):
            for name in ("model", "tokenizer", "chat_template"):
                prints[name] = f"fingerprint {prints[name][:8]}" if prints[name] not in ("", "none") else "none"
        return ", ".join(f"{name} ({mine[name]}, here {others[name]})" for name in mine if mine[name] != others[name])


@dataclass(frozen=True)
class SessionHeader:
    """The content of session.json.

    Attributes:
        identity: Whose the session is.
        calibration: What its labels and codes were made by, as `calibration_digest` gives it.
        model_name: What the user called the model.
        created: When it was saved, as ISO 8601 in UTC.
        token_ids: Document, questions and answers.
        stored: Tokens whose K/V are in the files; those behind them are still to be read.
        document_tokens: Of `token_ids`, those of the document.
        document: Where questions go behind a document that was a text.
        files: The other files, by name.
    """

    identity: SessionIdentity
    calibration: str
    model_name: str
    created: str
    token_ids: list[int]
    stored: int
    document_tokens: int
    document: DocumentPrompt | None
    files: dict[str, FileRecord] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of the files."""
        return sum(record.nbytes for record in self.files.values())

    def to_bytes(self) -> bytes:
        """The file's content."""
        content: dict[str, Any] = {"format": FORMAT, "version": VERSION} | asdict(self)
        return seal(content | {"token_ids": " ".join(map(str, self.token_ids))})

    @classmethod
    def read(cls, folder: Path) -> SessionHeader:
        """The header of the session in `folder`, whose files have the sizes that it states.

        Raises:
            LoadError: It is not there, damaged, of a newer format, or a file has another size.
        """
        path = folder / HEADER
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            what = "there is no session" if not folder.exists() else f"{folder} holds no session: there is no"
            raise LoadError(
                f"{what} {path if folder.exists() else folder}; `ds-offload session list` names them"
            ) from None
        except OSError as error:
            raise LoadError(f"cannot read {path}: {error.strerror}; give another session") from None
        header = cls._parse(data, path)
        for name, record in header.files.items():
            try:
                check_size(folder / name, record)
            except LoadError as error:
                raise LoadError(f"{error}; {REMEDY}") from None
        return header

    @classmethod
    def _parse(cls, data: bytes, path: Path) -> SessionHeader:
        damaged = LoadError(f"{path} is damaged; save the session again, or remove it")
        try:
            plain = json.loads(data)
            version = plain["version"] if plain["format"] == FORMAT else None
        except (ValueError, KeyError, TypeError, RecursionError):
            raise damaged from None
        # A newer format may be sealed in another way, so its number is believed.
        if isinstance(version, int) and version > VERSION:
            raise LoadError(
                f"{path} has format version {version}, and this version of ds-offload reads up to {VERSION}; "
                "update ds-offload, or read the document again"
            )
        try:
            content = unseal(data)
            del content["format"], content["version"]
            content["identity"] = SessionIdentity(**content["identity"])
            content["token_ids"] = [int(token) for token in content["token_ids"].split()]
            content["files"] = {name: FileRecord(**record) for name, record in content["files"].items()}
            if content["document"] is not None:
                content["document"] = DocumentPrompt(**content["document"])
            header = cls(**content)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise damaged from None
        if not 0 < header.stored <= len(header.token_ids) or any("/" in name for name in header.files):
            raise damaged
        return header

    def check(self, folder: Path, here: SessionIdentity) -> None:
        """Refuse a session of another model or setting.

        Raises:
            InputError: Naming what differs.
        """
        identity = self.identity
        if self.document is None:
            # Token ids are put together as they are.
            identity = replace(identity, chat_template="")
        differences = identity.differences(here)
        if differences:
            raise InputError(
                f"the session {folder} is of another {differences}; load it with that, or read the document again"
            )


def calibration_digest(calibration: Calibration, quantised: bool) -> str:
    """SHA-256 in hex of what labels, and codes of `quantised` K/V, are made by."""
    digest = hashlib.sha256(calibration.channels.numpy().tobytes())
    digest.update(calibration.key_mean.numpy().tobytes())
    if quantised:
        digest.update(calibration.key_factor.numpy().tobytes())
    if calibration.codes is not None:
        for tensor in calibration.codes.tensors():
            digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 in hex of what turns text into ids; "" without a tokenizer."""
    if tokenizer is None:
        return ""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        text = backend.to_str()
    elif hasattr(tokenizer, "get_vocab"):
        text = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    else:
        text = f"{type(tokenizer).__name__} of {len(tokenizer)}"
    return hashlib.sha256(text.encode()).hexdigest()


def template_fingerprint(tokenizer: Any) -> str:
    """SHA-256 in hex of a tokenizer's chat template, or of several by name; "none" without one."""
    template = getattr(tokenizer, "chat_template", None)
    return hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest() if template else "none"
