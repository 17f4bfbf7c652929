"""How a session begins: with a document that is read, with a first message, or as one that was saved."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ds_offload.document_prompt import DocumentPrompt
from ds_offload.dtypes import QUANTISED_BITS
from ds_offload.errors import InputError, LoadError
from ds_offload.given_path import given_path
from ds_offload.kv_context import KVContext
from ds_offload.prefill import ProgressCallback, prefill
from ds_offload.prefill_checkpoint import PrefillCheckpoint
from ds_offload.preparation import check_room, room_of
from ds_offload.prompts import encode_prompt
from ds_offload.session import Session
from ds_offload.session_file import read_calibration, read_session
from ds_offload.session_header import SessionHeader, SessionIdentity, calibration_digest
from ds_offload.session_place import HEADER, recover

if TYPE_CHECKING:
    from ds_offload.generator import OffloadedGenerator


@torch.no_grad()
def read_document(
    generator: OffloadedGenerator,
    document: Any,
    on_progress: ProgressCallback | None = None,
    checkpoint: str | Path | None = None,
) -> Session:
    """A session over a document; see `OffloadedGenerator.prefill`."""
    generator.check_open()
    loaded = generator.loaded
    prompt: DocumentPrompt | None = None
    if isinstance(document, str):
        prompt, ids = DocumentPrompt.read(document, loaded.tokenizer)
    elif isinstance(document, list | tuple) and not any(isinstance(entry, str | dict | list) for entry in document):
        ids = encode_prompt(document, loaded.tokenizer, loaded.source.shape.vocab_size)
    else:
        raise InputError("the document must be one text or one list of token ids; give messages to `generate`")
    check_room(ids, generator.config, "document")
    return _read(generator, prompt, ids, on_progress, checkpoint)


@torch.no_grad()
def begin_conversation(generator: OffloadedGenerator, system: str | None = None) -> Session:
    """A session without a document; see `OffloadedGenerator.converse`."""
    generator.check_open()
    prompt, ids = DocumentPrompt.opening(generator.loaded.tokenizer, system)
    check_room(ids, generator.config, "conversation")
    return _read(generator, prompt, ids, None, None)


def _read(
    generator: OffloadedGenerator,
    prompt: DocumentPrompt | None,
    ids: list[int],
    on_progress: ProgressCallback | None,
    checkpoint: str | Path | None,
) -> Session:
    """The session whose first tokens are `ids`."""
    loaded = generator.loaded
    room = room_of(generator.config)
    plan = generator.plan_call([len(ids)], [room], continued=True)
    codes = generator.calibrated(ids) if generator.config.kv_dtype in QUANTISED_BITS else None
    kept = PrefillCheckpoint.of(checkpoint, [ids], loaded.model, generator.config, codes)
    calibration = generator.calibrated(ids)
    context = KVContext(generator.decoder, generator.config, calibration, [room], generator.faults, generator.kept)
    with contextlib.ExitStack() as undo:
        undo.callback(context.close, keep=False)
        streamed = plan.prefill_mode == "streamed"
        prefill(generator.decoder, context, 0, ids, on_progress, streamed=streamed, checkpoint=kept)
        # Nothing waits for a first token: give back what the last layers' rows leave from.
        context.streams.join()
        _make_slots(context)
        undo.pop_all()
    return Session(generator, context, plan, calibration, prompt, ids, len(ids), len(ids))


@torch.no_grad()
def load_session(generator: OffloadedGenerator, path: str | Path) -> Session:
    """A session that was saved; see `OffloadedGenerator.load_session`."""
    generator.check_open()
    folder = given_path(path, "path").absolute()
    while True:
        recover(folder)
        seen = _content(folder)
        try:
            return _load(generator, folder, SessionHeader.read(folder))
        except LoadError:
            # Another process may have replaced it meanwhile: then what is there now is whole.
            recover(folder)
            if _content(folder) == seen:
                raise


def _content(folder: Path) -> bytes | None:
    try:
        return (folder / HEADER).read_bytes()
    except OSError:
        return None


def _load(generator: OffloadedGenerator, folder: Path, header: SessionHeader) -> Session:
    # Where the dtype of K/V was left open it is the session's.
    kv_dtype = header.identity.kv_dtype if generator.chooses("kv_dtype") else generator.config.kv_dtype
    config = dataclasses.replace(generator.config, kv_dtype=kv_dtype)
    header.check(folder, SessionIdentity.of(generator.loaded, config))
    ids, room = header.token_ids, room_of(config)
    check_room(ids, config, "session")
    calibration = read_calibration(folder, header)
    given = config.calibration
    if given is not None:
        digest = calibration_digest(generator.calibrated(ids), header.identity.quantised)
        if digest != header.calibration:
            raise InputError(
                f"the session {folder} was made with another calibration than {given}; "
                "leave the calibration out to use the session's own, or read the document again"
            )
    plan = generator.plan_call([1], [room], continued=True, kv_dtype=kv_dtype)
    context = KVContext(generator.decoder, generator.config, calibration, [room], generator.faults, generator.kept)
    with contextlib.ExitStack() as undo:
        undo.callback(context.close, keep=False)
        read_session(folder, header, context)
        _make_slots(context)
        undo.pop_all()
    return Session(generator, context, plan, calibration, header.document, ids, header.document_tokens, header.stored)


def _make_slots(context: KVContext) -> None:
    """Take the memory that was planned for the hot set: until the first question others could."""
    if context.hot_set is not None:
        context.hot_set.make()
