"""How a session begins: with a document that is read, or one that was saved."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ds_offload.config import OffloadConfig
from ds_offload.document_prompt import DocumentPrompt
from ds_offload.dtypes import QUANTISED_BITS
from ds_offload.errors import InputError
from ds_offload.kv_context import KVContext
from ds_offload.memory.plan import MemoryPlan
from ds_offload.prefill import ProgressCallback, prefill
from ds_offload.prefill_checkpoint import PrefillCheckpoint
from ds_offload.preparation import check_room, room_of
from ds_offload.prompts import encode_prompt
from ds_offload.session import Session
from ds_offload.session_file import read_calibration, read_session
from ds_offload.session_header import SessionHeader, SessionIdentity, calibration_digest

if TYPE_CHECKING:
    from ds_offload.generator import OffloadedGenerator


def check_session_config(config: OffloadConfig) -> None:
    """Refuse a session of quantised K/V, whose sinks and recent window the store does not have as they are attended to.

    Raises:
        InputError: `config` stores K/V at 8 or 4 bits.
    """
    if config.kv_dtype in QUANTISED_BITS:
        raise InputError(
            f"kv_dtype={config.kv_dtype!r} is not for sessions, which keep K/V in 16 or 32 bits; "
            "leave it out, and where that does not fit shorten the context or free host memory"
        )


def _plan(generator: OffloadedGenerator, tokens: int, room: int) -> MemoryPlan:
    plan = generator.plan_call([tokens], [room], continued=True)
    # "auto" may have chosen 8 or 4 bits.
    check_session_config(generator.config)
    return plan


@torch.no_grad()
def read_document(
    generator: OffloadedGenerator,
    document: Any,
    on_progress: ProgressCallback | None = None,
    checkpoint: str | Path | None = None,
) -> Session:
    """A session over a document; see `OffloadedGenerator.prefill`."""
    check_session_config(generator.config)
    loaded, prompt = generator.loaded, None
    if isinstance(document, str):
        prompt, ids = DocumentPrompt.read(document, loaded.tokenizer)
    elif isinstance(document, list | tuple) and not any(isinstance(entry, str | dict | list) for entry in document):
        ids = encode_prompt(document, loaded.tokenizer, loaded.source.shape.vocab_size)
    else:
        raise InputError("the document must be one text or one list of token ids; give messages to `generate`")
    check_room(ids, generator.config, "document")
    room = room_of(generator.config)
    plan = _plan(generator, len(ids), room)
    kept = PrefillCheckpoint.of(checkpoint, [ids], loaded.model, generator.config)
    calibration = generator.calibrated(ids)
    context = KVContext(generator.decoder, generator.config, calibration, [room], generator.faults, generator.kept)
    with contextlib.ExitStack() as undo:
        undo.callback(context.close, keep=False)
        streamed = plan.prefill_mode == "streamed"
        prefill(generator.decoder, context, 0, ids, on_progress, streamed=streamed, checkpoint=kept)
        undo.pop_all()
    return Session(generator, context, plan, calibration, prompt, ids, len(ids), len(ids))


@torch.no_grad()
def load_session(generator: OffloadedGenerator, path: str | Path) -> Session:
    """A session that was saved; see `OffloadedGenerator.load_session`."""
    check_session_config(generator.config)
    folder = Path(path).expanduser().absolute()
    header = SessionHeader.read(folder)
    header.check(folder, SessionIdentity.of(generator.loaded, generator.config))
    ids, room = header.token_ids, room_of(generator.config)
    check_room(ids, generator.config, "session")
    calibration = read_calibration(folder, header)
    given = generator.config.calibration
    if given is not None and calibration_digest(generator.calibrated(ids)) != header.calibration:
        raise InputError(
            f"the session {folder} was made with another calibration than {given}; "
            "leave the calibration out to use the session's own, or read the document again"
        )
    plan = _plan(generator, 1, room)
    context = KVContext(generator.decoder, generator.config, calibration, [room], generator.faults, generator.kept)
    with contextlib.ExitStack() as undo:
        undo.callback(context.close, keep=False)
        read_session(folder, header, context)
        undo.pop_all()
    return Session(generator, context, plan, calibration, header.document, ids, header.document_tokens, header.stored)
