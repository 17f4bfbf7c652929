"""The run-time monitor: now and then a decode step's attention is compared with exact attention."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from ds_offload.attention_fidelity import FidelitySums, compare_attention
from ds_offload.config import OffloadConfig, TokenBudget
from ds_offload.decode import DecodeLoop
from ds_offload.decoder import DecoderStack
from ds_offload.kv_context import KVContext
from ds_offload.label_choice import LABEL_BITS

# Below this share of the exact attention weight a run is warned about: see docs/fidelity.md.
LEAST_MASS = 0.6
# Of the weight that the best selection of as many tokens adds to the window's, the least share that the labels must
# find, where what they miss is more than `LEAST_MISSED` of all weight.
LEAST_FOUND = 0.65
LEAST_MISSED = 0.05
# Comparisons that a verdict needs: layers differ.
LEAST_COMPARISONS = 2


class MonitorPace:
    """When to compare, so that it costs no more than `SHARE` of the time that decoding takes.

    The first comparisons, `FIRST` of them behind step `FIRST_STEP`, are exempt: short answers
    get figures, too, and kernels are compiled. From then on one follows when decoding has
    taken 1 / `SHARE` times as long since the last as the last one took.

    Args:
        every: Steps between comparisons, whatever they cost; None keeps to the share.
    """

    SHARE = 0.01
    FIRST_STEP = 8
    FIRST = 2

    def __init__(self, every: int | None) -> None:
        self._every = every
        self._due_s = math.inf

    def due(self, steps: int, decode_s: float) -> int:
        """Comparisons to make now, after `steps` steps that took `decode_s` seconds, comparisons left out."""
        if self._every is not None:
            return int(steps % self._every == 0)
        return self.FIRST if steps == self.FIRST_STEP else int(decode_s >= self._due_s)

    def took(self, seconds: float, decode_s: float) -> None:
        """A comparison took `seconds`, when decoding had taken `decode_s`."""
        self._due_s = decode_s + seconds / self.SHARE


class FidelityMonitor:
    """Compares one layer of one sequence at a time, in turn, and says where attention captures too little.

    Args:
        config: Resolved; its `monitor` says what to do.
        clock: Seconds, for tests.
        budget: The budget at the beginning, where an earlier turn of a session may have raised it.
    """

    def __init__(
        self,
        decoder: DecoderStack,
        config: OffloadConfig,
        clock: Callable[[], float] = time.perf_counter,
        budget: str | None = None,
    ) -> None:
        self.seconds = 0.0
        self._decoder = decoder
        self._config = config
        self._clock = clock
        self._pace = MonitorPace(config.monitor_every)
        layers = [layer for layer in range(decoder.layers) if layer not in config.dense_layers]
        self._layers = _spread(layers)
        self._all = FidelitySums(decoder.layers)
        # Those with the budget of the moment.
        self._recent = FidelitySums(decoder.layers)
        self._steps = 0
        self._began: float | None = None
        self._budget = budget or config.token_budget

    def stepped(self, context: KVContext, loop: DecodeLoop, lengths: list[int], running: list[int]) -> None:
        """Behind a step of contexts of `lengths` tokens: compare if it is time to.

        Args:
            running: The sequences whose answers are not at their end; a comparison takes one of them.
        """
        if self._config.monitor == "off" or not self._layers or self._config.budget.fraction == 1:
            return
        self._steps += 1
        now = self._clock()
        if self._began is None:
            self._began = now
        for _ in range(self._pace.due(self._steps, now - self._began - self.seconds)):
            self._compare(context, loop, lengths, running)

    def _compare(self, context: KVContext, loop: DecodeLoop, lengths: list[int], running: list[int]) -> None:
        assert loop.last is not None and self._began is not None
        started = self._clock()
        number = self._all.comparisons
        layer, sequence = self._layers[number % len(self._layers)], running[number % len(running)]
        fidelity = compare_attention(self._decoder, context, loop.last, layer, sequence, lengths[sequence])
        self._all.add(layer, fidelity)
        self._recent.add(layer, fidelity)
        ended = self._clock()
        self.seconds += ended - started
        self._pace.took(ended - started, ended - self._began - self.seconds)
        if self._config.monitor == "widen" and self._verdict() is not None and context.widen():
            self._recent = FidelitySums(self._decoder.layers)
            self._budget = context.token_budget

    def summary(self) -> dict[str, Any] | None:
        """The figures for `stats["monitor"]`; None where nothing was compared. See docs/design.md."""
        if not self._all.comparisons:
            return None
        return {
            **self._all.figures(),
            "comparisons": self._all.comparisons,
            "seconds": self.seconds,
            "token_budget": self._budget,
            "warning": self._verdict(),
        }

    def _verdict(self) -> str | None:
        """What to change, in a line; None where enough is captured, or too little was seen to tell."""
        if self._recent.comparisons < LEAST_COMPARISONS:
            return None
        figures = self._recent.figures()
        mass, best, window = (figures[name] for name in ("attention_mass", "best_mass", "window_mass"))
        seen = f"attention captures {100 * mass:.0f} % of the exact weight"
        if best - mass > LEAST_MISSED and mass - window < LEAST_FOUND * (best - window):
            best_seen = f"the best selection at {self._budget} {100 * best:.0f} %"
            return f"{seen}, and {best_seen}: the labels miss it; {self._finer()}"
        if mass < LEAST_MASS:
            return f"{seen}, and the best selection at {self._budget} no more than {100 * best:.0f} %; {self._wider()}"
        return None

    def _wider(self) -> str:
        budget = TokenBudget.parse(self._budget)
        if budget.top_p is not None:
            return "set --token-budget 1/2"
        return f"set --token-budget {budget.scaled(Fraction(2))}"

    def _finer(self) -> str:
        config = self._config
        way = "set --calibration to one of a text like this (`ds-offload calibrate --data`)"
        if config.prefetch == "speculative":
            way = "set --prefetch exact"
        elif config.label_code == "scalar" and config.label_bits != LABEL_BITS[0]:
            bits = min(bits for bits in LABEL_BITS if bits > (config.label_bits or 0))
            way = f"set --label-bits {bits} --label-channels {config.label_channels}, or {way.removeprefix('set ')}"
        return f"{way}, or {self._wider().removeprefix('set ')}"


def _spread(layers: list[int]) -> list[int]:
    """The layers in an order in which few of them stand for all: from the middle, in long strides."""
    count = len(layers)
    stride = next((n for n in range(round(0.38 * count), count) if math.gcd(n, count) == 1), 1)
    return [layers[(count // 2 + n * stride) % count] for n in range(count)]
