"""The training loop: lengths grow, the state is saved, and a run that was cut off goes on."""

from __future__ import annotations

import json
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from long_context.adapted_llama import AdaptedLlama
from long_context.adapter_files import STATE, load_state, save_adapter, save_state
from long_context.answer_counts import Counts, count_answers, counts_line
from long_context.training_data import TrainingData
from long_context.training_sequences import ANSWER, FACT, TEXT

LOG = "log.jsonl"
# Up to which share of the training, how often a step has which length.
STAGES: tuple[tuple[float, dict[int, float]], ...] = (
    (0.12, {1024: 0.5, 2048: 0.5}),
    (0.30, {2048: 0.3, 4096: 0.4, 8192: 0.3}),
    (0.50, {4096: 0.2, 8192: 0.3, 16384: 0.5}),
    (0.72, {8192: 0.2, 16384: 0.2, 32768: 0.6}),
    (1.00, {8192: 0.25, 32768: 0.25, 65536: 0.5}),
)
# The share of the training from which the learning rate falls.
DECAY_FROM, LAST_RATE = 0.6, 0.05


@dataclass(frozen=True)
class Plan:
    """How to train.

    Attributes:
        minutes: Of all runs together; `steps` instead counts steps.
        rate: Highest learning rate of A and B; that of the norms is a tenth.
        step_tokens: Of one step, where a sequence is not longer.
        skipped: Share of the sequences with facts whose positions leave gaps, so that a short one has the distances
            of a long one (PoSE, arXiv 2309.10400).
        text_weight: Of the mean loss of text, beside that of answers.
        text_tokens: Most tokens of text in a step that are predicted.
    """

    minutes: float = 10.0
    steps: int | None = None
    rate: float = 1.5e-3
    warmup: int = 30
    step_tokens: int = 16_384
    skipped: float = 0.5
    text_weight: float = 0.3
    text_tokens: int = 8192
    seed: int = 1


@dataclass
class Trainer:
    """Trains an adapter.

    Attributes:
        folder: Where the state, the adapter and the log go.
        base: The model's name, for the adapter's config.
    """

    model: AdaptedLlama
    data: TrainingData
    plan: Plan
    folder: Path
    base: str
    progress: dict[str, Any] = field(default_factory=lambda: {"step": 0, "seconds": 0.0, "tokens": 0, "used": {}})
    _stop: bool = False
    # Of the steps since the last report, on the device until then.
    _pending: list[tuple[int, np.ndarray, np.ndarray, Tensor, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._parameters = self.model.parameters()
        matrices = [weight for weight in self._parameters.values() if weight.dim() == 3]
        norms = [weight for weight in self._parameters.values() if weight.dim() < 3]
        groups = [{"params": matrices, "scale": 1.0}, {"params": norms, "scale": 0.1}]
        self._device = self.model.embedding.device
        fused = self._device.type == "cuda"
        self._optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), weight_decay=0.0, fused=fused)

    @property
    def done(self) -> float:
        """The share of the training that is done."""
        if self.plan.steps is not None:
            return min(1.0, float(self.progress["step"]) / self.plan.steps)
        return min(1.0, float(self.progress["seconds"]) / (60 * self.plan.minutes))

    def resume(self) -> None:
        """Go on from the folder's state."""
        if not (self.folder / STATE).is_file():
            raise SystemExit(f"{self.folder} holds no {STATE} to resume from; leave out --resume to begin")
        self.progress = load_state(self._parameters, self._optimizer, self.folder)

    def run(self, stop_after: float, report_every: float = 10.0, save_every: float = 60.0) -> None:
        """Train until all is done, `stop_after` seconds have passed or SIGTERM comes, then save.

        Raises:
            SystemExit: The loss is not a number; the state on disk is the last good one.
        """
        before = {number: signal.signal(number, self._ask_to_stop) for number in (signal.SIGTERM, signal.SIGINT)}
        started = reported = saved = time.monotonic()
        seconds, tokens = self.progress["seconds"], self.progress["tokens"]
        try:
            while self.done < 1 and not self._stop and time.monotonic() - started < stop_after:
                self.step()
                now = time.monotonic()
                self.progress["seconds"] = seconds + now - started
                if now - reported >= report_every:
                    self._report((self.progress["tokens"] - tokens) / (now - reported))
                    reported, tokens = now, self.progress["tokens"]
                if now - saved >= save_every:
                    self.save()
                    saved = now
            self._report((self.progress["tokens"] - tokens) / max(1e-9, time.monotonic() - reported))
            self.save()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def step(self) -> None:
        """One step, on sequences of one length."""
        plan, step = self.plan, self.progress["step"]
        chance = np.random.default_rng([plan.seed, step])
        length = self._length(chance)
        rows = max(1, plan.step_tokens // length)
        used = self.progress["used"].get(str(length), 0)
        tokens, kinds = self.data.batch(length, used, rows, plan.seed)
        positions = np.stack([self._positions(row, chance) for row in kinds])
        places, weights = self._predicted(kinds, chance)
        ids = torch.from_numpy(tokens).to(self._device)
        hidden = self.model.hidden(ids, torch.from_numpy(positions).to(self._device)).flatten(0, 1)
        at = torch.from_numpy(places).to(self._device)
        targets, scale = ids.flatten()[at], torch.from_numpy(weights).to(self._device)
        loss, losses, right = self.model.losses(hidden.index_select(0, at - 1), targets, scale)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(self._parameters.values()), 1.0)
        rate = plan.rate * min(1.0, (step + 1) / plan.warmup) * _decayed(self.done)
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._pending.append((length, places, kinds.flatten()[places], losses, right))
        self.progress["step"], self.progress["rate"] = step + 1, rate
        self.progress["used"][str(length)] = used + rows
        self.progress["tokens"] += rows * length

    def save(self) -> None:
        """Write state and adapter."""
        save_state(self._parameters, self._optimizer, self.progress, self.folder)
        save_adapter(self.model, self.folder, self.base)

    def _ask_to_stop(self, *_: Any) -> None:
        self._stop = True

    def _length(self, chance: np.random.Generator) -> int:
        """A length of this part of the training; the longest there is where the data has none of them."""
        wanted = next(lengths for until, lengths in STAGES if self.done <= until)
        shares = {length: share for length, share in wanted.items() if length in self.data.tokens}
        shares = shares or {max(self.data.tokens): 1.0}
        weights = np.array(list(shares.values()))
        return int(chance.choice(list(shares), p=weights / weights.sum()))

    def _positions(self, kinds: np.ndarray, chance: np.random.Generator) -> np.ndarray:
        """Positions of a sequence: one after the other, or with two gaps."""
        positions = np.arange(len(kinds))
        room = self.model.shape.max_positions - len(kinds)
        if room > 0 and (kinds >= FACT).any() and chance.random() < self.plan.skipped:
            gaps = np.diff([0, *np.sort(chance.integers(0, room + 1, 2))])
            for cut, gap in zip(np.sort(chance.integers(1, len(kinds), 2)), gaps, strict=True):
                positions[cut:] += gap
        return positions

    def _predicted(self, kinds: np.ndarray, chance: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Which tokens of the flattened batch are predicted, ascending, and what each weighs in the loss."""
        inner = kinds.copy()
        # Nothing stands before a sequence's first token.
        inner[:, 0] = 0
        answers, text = np.flatnonzero(inner >= ANSWER), np.flatnonzero(inner == TEXT)
        if len(text) > self.plan.text_tokens:
            text = chance.choice(text, self.plan.text_tokens, replace=False)
        places = np.concatenate([answers, text])
        weights = np.full(len(places), 1 / max(1, len(answers)), np.float32)
        weights[len(answers) :] = self.plan.text_weight / max(1, len(text))
        order = np.argsort(places)
        return places[order], weights[order]

    def _report(self, speed: float) -> None:
        """One line on the steps since the last, and the same to the log."""
        if not self._pending:
            return
        counts: Counts = {}
        sums = {"answers": [0.0, 0], "text": [0.0, 0]}
        for length, places, kinds, losses, right in self._pending:
            count_answers(counts, length, places, kinds, right.cpu().numpy())
            each = losses.cpu().numpy()
            for name, chosen in (("answers", kinds >= ANSWER), ("text", kinds == TEXT)):
                sums[name][0] += float(each[chosen].sum())
                sums[name][1] += int(chosen.sum())
        self._pending.clear()
        means = {name: total / count if count else None for name, (total, count) in sums.items()}
        if any(mean is not None and not np.isfinite(mean) for mean in means.values()):
            raise SystemExit(f"the loss is not a number at step {self.progress['step']}; lower --rate and resume")
        row = {**self.progress, "done": self.done, "tokens_per_s": speed, **means, "right": counts}
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / LOG, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        losses_line = ", ".join(f"{name} {mean:.3f}" for name, mean in means.items() if mean is not None)
        head = f"step {row['step']}, {100 * self.done:.0f} %, {speed / 1000:.1f}k tokens/s, loss of {losses_line}"
        print(f"{head} | {counts_line(counts)}", flush=True)


def _decayed(done: float) -> float:
    """The learning rate's factor: 1, then down a line."""
    return 1 - (1 - LAST_RATE) * max(0.0, done - DECAY_FROM) / (1 - DECAY_FROM)
