"""`eval ppl`: the loss of a text's tokens, predicted by decode steps."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_offload.config import OffloadConfig
from ds_offload.evaluation.result import EvalResult, counted, mean
from ds_offload.evaluation.subject import EvalSubject, dense_twin
from ds_offload.evaluation.teacher_forcing import ForcedFigures, teacher_force
from ds_offload.evaluation.windows import Window, cut_windows, default_positions
from ds_offload.prefill import ProgressCallback


def window_nll(
    subject: EvalSubject,
    config: OffloadConfig,
    window: Window,
    positions: int,
    on_progress: ProgressCallback | None = None,
) -> tuple[list[float], ForcedFigures]:
    """The loss in nats of each of the window's last `positions` tokens, and what the steps took.

    The token in front of the first of them is the first that is decoded: the prompt's own
    logits, which are dense, predict nothing that is counted.
    """
    targets = torch.tensor(window.ids[-positions:])
    losses: list[float] = []

    def visit(number: int, logits: Tensor) -> None:
        losses.append(F.cross_entropy(logits, targets[number].to(logits.device)).item())

    figures = teacher_force(subject, config, window.ids[:-1], positions, visit, on_progress)
    return losses, figures


def measure_windows(
    subject: EvalSubject,
    config: OffloadConfig,
    windows: list[Window],
    positions: int,
    what: str = "windows",
    on_progress: ProgressCallback | None = None,
) -> tuple[dict[str, Any], float]:
    """The loss over all windows and of each, and the mean density.

    Returns:
        `nll`, `h2d_bytes_per_token` and `windows`; and the share of the context attended to.
    """
    rows: list[dict[str, Any]] = []
    densities, moved = [], []
    for window in counted(windows, len(windows), what):
        losses, figures = window_nll(subject, config, window, positions, on_progress)
        rows.append({"text": window.text, "window": window.number, "nll": mean(losses)})
        densities.append(figures.density)
        moved.append(figures.h2d_bytes_per_token)
    nll = mean([row["nll"] for row in rows])
    return {"nll": nll, "h2d_bytes_per_token": round(mean(moved)), "windows": rows}, mean(densities)


def eval_perplexity(
    subject: EvalSubject,
    texts: dict[str, str],
    positions: int | None = None,
    limit: int | None = None,
    on_progress: ProgressCallback | None = None,
) -> EvalResult:
    """Dense and sparse loss of the last `positions` tokens of every window.

    Args:
        texts: Texts by name.
        positions: None is the device's default.
        limit: Most windows of each text; None is all on a GPU and one on a CPU.

    Raises:
        InputError: A text shorter than the context, or a budget that leaves nothing out.
    """
    positions = default_positions(subject) if positions is None else positions
    windows = cut_windows(subject, texts, positions, limit)
    dense, _ = measure_windows(subject, dense_twin(subject.config), windows, positions, "dense windows", on_progress)
    sparse, density = measure_windows(subject, subject.config, windows, positions, "sparse windows", on_progress)
    del dense["h2d_bytes_per_token"]
    options = {"ctx": subject.context, "positions": positions, "texts": list(texts)}
    return EvalResult("ppl", subject.name, subject.config, "nll", dense, sparse, density, options)
