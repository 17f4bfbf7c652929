"""`eval agreement`: how close sparse decoding's predictions and attention are to dense decoding's, on one text."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_offload.attention_fidelity import FidelitySums, compare_step
from ds_offload.evaluation.result import EvalResult, counted, mean
from ds_offload.evaluation.subject import EvalSubject, dense_twin
from ds_offload.evaluation.teacher_forcing import teacher_force
from ds_offload.evaluation.windows import Window, cut_windows, default_positions
from ds_offload.kv_context import KVContext
from ds_offload.prefetch.selection import Step
from ds_offload.prefill import ProgressCallback


def kl_divergence(dense: Tensor, sparse: Tensor) -> float:
    """KL(dense || sparse) in nats of two rows of logits `[vocab]`."""
    reference = dense.float().log_softmax(-1)
    return F.kl_div(sparse.float().log_softmax(-1), reference, reduction="sum", log_target=True).item()


class _Comparison:
    """Sums over the steps of one window: the dense run comes first and its logits are kept on the CPU."""

    def __init__(self, targets: list[int]) -> None:
        self.dense: list[Tensor] = []
        self.losses: dict[str, list[float]] = {"dense": [], "sparse": []}
        self.same: list[float] = []
        self.divergence: list[float] = []
        self._targets = targets

    def take_dense(self, number: int, logits: Tensor) -> None:
        self.dense.append(logits.cpu().clone())
        self._score("dense", number, logits)

    def take_sparse(self, number: int, logits: Tensor) -> None:
        self._score("sparse", number, logits)
        reference = self.dense[number].to(logits.device)
        self.same.append(float(torch.equal(reference.argmax(), logits.argmax())))
        self.divergence.append(kl_divergence(reference, logits))

    def _score(self, which: str, number: int, logits: Tensor) -> None:
        target = torch.tensor(self._targets[number], device=logits.device)
        self.losses[which].append(F.cross_entropy(logits, target).item())


def eval_agreement(
    subject: EvalSubject,
    texts: dict[str, str],
    positions: int | None = None,
    limit: int | None = None,
    on_progress: ProgressCallback | None = None,
) -> EvalResult:
    """Share of equal first choices, KL, attention mass and output error over the last `positions` tokens of windows.

    Args:
        texts: Texts by name.
        positions: None is the device's default.
        limit: Most windows of each text; None is all on a GPU and one on a CPU.

    Raises:
        InputError: A text shorter than the context, or a budget that leaves nothing out.
    """
    positions = default_positions(subject) if positions is None else positions
    windows = cut_windows(subject, texts, positions, limit)
    decoder = subject.sparse.decoder
    sums = FidelitySums(decoder.layers)
    comparisons, densities = [], []
    for window in counted(windows, len(windows), "windows"):
        comparison, density = _compare_window(subject, window, positions, sums, on_progress)
        comparisons.append(comparison)
        densities.append(density)
    losses = {which: mean([loss for one in comparisons for loss in one.losses[which]]) for which in ("dense", "sparse")}
    sparse: dict[str, Any] = {
        "nll": losses["sparse"],
        "top1_match": mean([same for one in comparisons for same in one.same]),
        "kl": mean([value for one in comparisons for value in one.divergence]),
        **sums.figures(),
    }
    options = {"ctx": subject.context, "positions": positions, "texts": list(texts), "windows": len(windows)}
    model = subject.name
    density = mean(densities)
    return EvalResult("agreement", model, subject.config, "nll", {"nll": losses["dense"]}, sparse, density, options)


def _compare_window(
    subject: EvalSubject, window: Window, positions: int, sums: FidelitySums, on_progress: ProgressCallback | None
) -> tuple[_Comparison, float]:
    ids, comparison = window.ids[:-1], _Comparison(window.ids[-positions:])
    teacher_force(subject, dense_twin(subject.config), ids, positions, comparison.take_dense, on_progress)
    decoder = subject.sparse.decoder

    def watch(context: KVContext, step: Step, lengths: list[int]) -> None:
        compare_step(decoder, context, step, lengths, sums)

    figures = teacher_force(subject, subject.config, ids, positions, comparison.take_sparse, on_progress, watch=watch)
    comparison.dense.clear()
    return comparison, figures.density
