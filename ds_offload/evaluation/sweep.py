"""`eval sweep`: loss over dense at several budgets, label settings and prefetch modes."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ds_offload.calibration_file import has_codes
from ds_offload.config import OffloadConfig, TokenBudget
from ds_offload.dtypes import QUANTISED_BITS
from ds_offload.errors import InputError
from ds_offload.evaluation.perplexity import measure_windows
from ds_offload.evaluation.result import EvalResult
from ds_offload.evaluation.subject import EvalSubject, check_sparse, dense_twin
from ds_offload.evaluation.windows import cut_windows, default_positions
from ds_offload.label_choice import choose_labels
from ds_offload.label_setting import label_layout, label_name
from ds_offload.notices import notice
from ds_offload.prefill import ProgressCallback

MODES = ("off", "exact", "speculative")


@dataclass(frozen=True)
class SweepGrid:
    """What is combined: all of one with all of the others.

    Attributes:
        budgets: Values of `token_budget`.
        labels: Channels and bits of scalar labels; channels None are 1/16 of a 16-bit key's bytes. None for
            the product code.
        modes: Values of `prefetch`.
    """

    budgets: tuple[str, ...]
    labels: tuple[tuple[int | None, int] | None, ...]
    modes: tuple[Any, ...]

    @classmethod
    def parse(cls, budgets: str, labels: str, modes: str) -> SweepGrid:
        """Read "1/8,1/16", "product,28x2,4" (channels x bits, or bits) and "off,speculative".

        Raises:
            InputError: One of them is empty or has an entry of another kind.
        """
        wrong = next((mode for mode in _entries(modes, "modes", "off,exact") if mode not in MODES), None)
        if wrong is not None:
            raise InputError(f"modes={modes!r} names {wrong!r}; give some of {','.join(MODES)}")
        return cls(
            tuple(str(TokenBudget.parse(entry)) for entry in _entries(budgets, "budgets", "1/8,1/16,1/32")),
            tuple(_label(entry) for entry in _entries(labels, "labels", "product,28x2")),
            _entries(modes, "modes", "off,exact"),
        )

    def configs(self, config: OffloadConfig, head_dim: int) -> list[OffloadConfig]:
        """`config` at every point of the grid.

        Raises:
            InputError: Labels that such heads or the calibration cannot have.
        """
        made = []
        for budget, labels, mode in itertools.product(self.budgets, self.labels, self.modes):
            wanted, bits = labels or (None, None)
            code, bits, channels = choose_labels(
                "product" if labels is None else "scalar",
                bits,
                wanted,
                head_dim,
                has_codes(config.calibration),
                config.calibration,
            )
            changes: dict[str, Any] = {"label_code": code, "label_bits": bits, "label_channels": channels}
            made.append(dataclasses.replace(config, token_budget=budget, prefetch=mode, **changes))
        return made


def eval_sweep(
    subject: EvalSubject,
    grid: SweepGrid,
    texts: dict[str, str],
    positions: int | None = None,
    limit: int | None = None,
    on_progress: ProgressCallback | None = None,
) -> EvalResult:
    """Measure the loss at every point of the grid on the same windows.

    Returns:
        A result whose `options["rows"]` has a row of every point; `sparse` and `config` are
        those of the point with the least loss.

    Raises:
        InputError: A text shorter than the context, or a budget that leaves nothing out.
    """
    positions = default_positions(subject) if positions is None else positions
    configs = grid.configs(subject.prepared.config, subject.prepared.source.shape.head_dim)
    stored = _stored_as(subject, configs)
    configs = [dataclasses.replace(config, kv_dtype=stored) for config in configs]
    for config in configs:
        check_sparse(config, subject.context - positions)
    windows = cut_windows(subject, texts, positions, limit)
    twin = dataclasses.replace(dense_twin(subject.config), kv_dtype=stored)
    dense, _ = measure_windows(subject, twin, windows, positions, "dense windows", on_progress)
    points: list[tuple[OffloadConfig, dict[str, Any], float]] = []
    for number, config in enumerate(configs, 1):
        figures, density = measure_windows(subject, config, windows, positions, "windows", on_progress)
        points.append((config, figures, density))
        notice(f"{number} of {len(configs)}: {_name(config)}: loss {figures['nll'] - dense['nll']:+.4f} nats")
    rows = [_row(config, figures, density, dense["nll"]) for config, figures, density in points]
    best, sparse, density = min(points, key=lambda point: point[1]["nll"])
    del dense["h2d_bytes_per_token"]
    options = {"ctx": subject.context, "positions": positions, "texts": list(texts), "rows": rows}
    return EvalResult("sweep", subject.name, best, "nll", dense, sparse, density, options)


def _stored_as(subject: EvalSubject, configs: list[OffloadConfig]) -> str:
    """The K/V dtype of all points: where it is open, the one of fewest bits that a point or the subject needs.

    Points with dtypes of their own would differ in more than the grid does.
    """
    names = [subject.settled(config).kv_dtype for config in (subject.config, *configs)]
    return next((name for name in reversed(QUANTISED_BITS) if name in names), names[0])


def _row(config: OffloadConfig, figures: dict[str, Any], density: float, dense_nll: float) -> dict[str, Any]:
    return {
        "token_budget": config.token_budget,
        "label_code": config.label_code,
        "label_channels": config.label_channels,
        "label_bits": config.label_bits,
        "label_bytes": label_layout(config).row_bytes,
        "kv_dtype": config.kv_dtype,
        "prefetch": config.prefetch,
        "nll": figures["nll"],
        "delta": figures["nll"] - dense_nll,
        "mean_density": density,
        "h2d_bytes_per_token": figures["h2d_bytes_per_token"],
    }


def _name(config: OffloadConfig) -> str:
    labels = label_name(config.label_code, config.label_channels, config.label_bits)
    return f"budget {config.token_budget}, labels {labels}, {config.prefetch}"


def _entries(text: str, field: str, example: str) -> tuple[str, ...]:
    entries: Sequence[str] = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not entries:
        raise InputError(f"{field}={text!r} is empty; give entries with commas between them, such as {example}")
    return tuple(entries)


def _label(entry: str) -> tuple[int | None, int] | None:
    if entry == "product":
        return None
    match = re.fullmatch(r"(?:([1-9]\d*)x)?(16|8|4|2)", entry)
    if match is None:
        raise InputError(
            f"labels={entry!r} is no label setting; write product, channels x bits such as 28x2, or bits alone: "
            "16, 8, 4 or 2"
        )
    return int(match[1]) if match[1] else None, int(match[2])
