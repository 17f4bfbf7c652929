"""Texts cut into contexts of one length."""

from __future__ import annotations

from dataclasses import dataclass

from ds_offload.errors import InputError
from ds_offload.evaluation.subject import DEFAULTS, EvalSubject, announce_window, check_sparse


@dataclass(frozen=True)
class Window:
    """One context of a text.

    Attributes:
        text: The text's name.
        number: Which window of that text, from 0.
        ids: Token ids; the last `positions` of them are predicted.
    """

    text: str
    number: int
    ids: list[int]


def cut_windows(subject: EvalSubject, texts: dict[str, str], positions: int, limit: int | None = None) -> list[Window]:
    """Windows of the context's length, one behind the other, what is left over at the end dropped.

    Args:
        texts: Texts by name.
        positions: Last tokens of each window that will be predicted by decode steps.
        limit: Most windows of each text; None is all on a GPU and one on a CPU.

    Raises:
        InputError: A text shorter than the context, too many positions, or a budget that
            leaves nothing out.
        MemoryPlanError: Such a context does not fit.
    """
    length = subject.context
    if positions > length - 2:
        raise InputError(
            f"positions={positions:,} of a context of {length:,} tokens leave no prompt; "
            f"give --positions {max(1, length // 4)} or fewer, or a longer context with --ctx"
        )
    check_sparse(subject.config, length - positions)
    subject.check_memory(length - 1 - positions, length - 1)
    if limit is None and subject.device.type == "cpu":
        limit = 1
    windows = []
    for name, text in texts.items():
        ids = subject.encode(text)
        # A tokenizer's first token stands in front of every window.
        first = [ids[0]] if ids[0] == getattr(subject.tokenizer, "bos_token_id", None) else []
        body = ids[len(first) :]
        step = length - len(first)
        count = len(body) // step
        if not count:
            raise InputError(
                f"{name} has {len(ids):,} tokens, and --ctx is {length:,}; give a longer text or a shorter context"
            )
        windows += [
            Window(name, number, first + body[number * step : (number + 1) * step])
            for number in range(count if limit is None else min(count, limit))
        ]
    announce_window(subject.config, length)
    return windows


def default_positions(subject: EvalSubject) -> int:
    """Decode steps of a window where the user gave no number: a quarter of the context at most."""
    return max(1, min(DEFAULTS[subject.device.type][1], subject.context // 4))
