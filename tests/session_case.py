"""Sessions of a tiny model: a document, questions about it, and all that a session keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_models import random_prompts

from ds_offload import OffloadConfig, OffloadedGenerator
from ds_offload.session import Session
from ds_offload.session_place import HEADER

NEW = 14
DOCUMENT = random_prompts(150)[0]
QUESTIONS = [random_prompts(length, seed=length)[0] for length in (9, 1, 40)]
# Of a saved session; quantised rows come with their window in another one.
FILES = {HEADER, "calibration.safetensors", "labels.safetensors"} | {f"layer-{n:04d}.safetensors" for n in range(3)}


def make(model: Path, device: str = "cpu", **changes: Any) -> OffloadedGenerator:
    config = {"max_context": 400, "sink_tokens": 2, "recent_tokens": 4, "token_budget": 24, "segment_tokens": 16}
    return OffloadedGenerator.from_pretrained(str(model), config=OffloadConfig(**config | changes), device=device)


def ask(session: Session, question: list[int], **options: Any) -> Any:
    return session.ask(question, max_new_tokens=NEW, output_logits=True, **options)


def cache_of(session: Session) -> list[torch.Tensor]:
    """All that a session keeps of its tokens: stored rows, labels and, where rows are quantised, the window."""
    context, tokens = session._conversation.context, session.stored
    parts = [part.clone() for layer in range(3) for part in context.row_parts(layer, 0, tokens)]
    parts += [context.labels.rows[:, :, :tokens].clone()]
    if context.codec is not None and context.window_buffer is not None:
        sinks, ring = context.window.sinks, context.window.ring
        held = [*range(min(sinks, tokens)), *range(max(sinks, tokens - ring), tokens)]
        slots = context.window_buffer.places(torch.tensor([held]))[0]
        parts += [rows[:, :, slots] for rows in context.window_buffer.copy().values()]
    return parts


def assert_same_cache(first: list[torch.Tensor], second: list[torch.Tensor]) -> None:
    assert len(first) == len(second) > 3
    for mine, other in zip(first, second, strict=True):
        assert torch.equal(mine, other)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
