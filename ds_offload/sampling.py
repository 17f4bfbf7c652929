"""From a row of logits to the next token: greedy, or transformers' own processors and a draw."""

from __future__ import annotations

import functools
import math
import os
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ds_offload.config import parse_tokens
from ds_offload.errors import InputError, LoadError
from ds_offload.notices import warn

LOWEST_TEMPERATURE = 1e-4  # below it, float32 logits divided by the temperature may overflow
PENALTIES = (0.01, 100)  # beyond them, float32 logits times or divided by the penalty may overflow

_warn_once = functools.cache(warn)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class SamplingParams:
    """How one answer is drawn.

    Attributes:
        max_new_tokens: Most tokens of the answer (64, "1k").
        temperature: 0 is greedy; 1 draws from the model's own distribution.
        top_k: Draw among the k likeliest tokens; None or 0 is off.
        top_p: Draw among the likeliest tokens that together reach this probability; None or 1 is off.
        min_p: Draw among tokens of at least this share of the likeliest one's probability; None is off.
        repetition_penalty: Over 1 makes tokens of the prompt and the answer less likely; None or 1 is off.
            Applies to greedy decoding too.
        stop: Strings that end the answer; the text ends before the first of them.
        seed: Makes the draw repeatable; None is different every time.

    Raises:
        InputError: A value out of range, naming what was given and what is needed.
    """

    max_new_tokens: int | str = 256
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop: tuple[str, ...] | list[str] | str | None = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        def fix(field: str, value: Any) -> None:
            object.__setattr__(self, field, value)

        fix("max_new_tokens", parse_tokens(self.max_new_tokens, "max_new_tokens"))
        stop = self.stop
        stop = () if stop is None else (stop,) if isinstance(stop, str) else stop
        if not isinstance(stop, list | tuple) or not all(isinstance(text, str) and text for text in stop):
            raise InputError(f"stop={self.stop!r} must be a text that is not empty, or a list of such texts")
        fix("stop", tuple(stop))

        t = self.temperature
        if not _number(t) or t < 0 or 0 < t < LOWEST_TEMPERATURE:
            raise InputError(f"temperature={t!r} must be 0 (greedy) or at least {LOWEST_TEMPERATURE}, such as 0.7")
        if self.top_k is not None and (
            isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 0
        ):
            raise InputError(f"top_k={self.top_k!r} must be a whole number of tokens, such as 50 (0 is off)")
        if self.top_p is not None and not (_number(self.top_p) and 0 < self.top_p <= 1):
            raise InputError(f"top_p={self.top_p!r} must be over 0 and up to 1, such as 0.95")
        if self.min_p is not None and not (_number(self.min_p) and 0 <= self.min_p <= 1):
            raise InputError(f"min_p={self.min_p!r} must be between 0 and 1, such as 0.05")
        penalty = self.repetition_penalty
        low, high = PENALTIES
        if penalty is not None and not (_number(penalty) and low <= penalty <= high):
            raise InputError(f"repetition_penalty={penalty!r} must be from {low} to {high}, such as 1.1 (1 is off)")
        seed = self.seed
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63):
            raise InputError(f"seed={seed!r} must be a whole number from 0 to 2^63 - 1")

        without_effect = [name for name in ("top_k", "min_p") if getattr(self, name)]
        without_effect += ["top_p"] if self.top_p not in (None, 1) else []
        if t == 0 and without_effect:
            _warn_once(
                f"temperature is 0, so {', '.join(without_effect)} has no effect; set a temperature above 0 to sample"
            )

    def processors(self) -> LogitsProcessorList:
        """transformers' processors, in the order of its `generate`; they take (ids [1, N], logits [1, vocab])."""
        chain = LogitsProcessorList()
        if self.repetition_penalty is not None and self.repetition_penalty != 1:
            chain.append(RepetitionPenaltyLogitsProcessor(float(self.repetition_penalty)))
        if self.temperature == 0:
            return chain
        if self.temperature != 1:
            chain.append(TemperatureLogitsWarper(float(self.temperature)))
        if self.top_k:
            chain.append(TopKLogitsWarper(self.top_k))
        if self.top_p is not None and self.top_p < 1:
            chain.append(TopPLogitsWarper(float(self.top_p)))
        if self.min_p is not None:
            chain.append(MinPLogitsWarper(float(self.min_p)))
        return chain


class Sampler:
    """Draws the tokens of one sequence; what it draws does not depend on other sequences.

    Args:
        params: How to draw.
        prompt_ids: Token ids of the prompt, which the repetition penalty counts.
        device: Device of the logits.
    """

    def __init__(self, params: SamplingParams, prompt_ids: list[int], device: torch.device | str) -> None:
        self._greedy = params.temperature == 0
        self._processors = params.processors()
        self._generator: torch.Generator | None = None
        if not self._greedy:
            seed = params.seed if params.seed is not None else int.from_bytes(os.urandom(8), "little") >> 1
            self._generator = torch.Generator(device).manual_seed(seed)
        # The ids that the repetition penalty looks at, each once: it only asks whether a token was there.
        self._seen: Tensor | None = None
        if params.repetition_penalty is not None and params.repetition_penalty != 1:
            self._seen = torch.tensor(sorted(set(prompt_ids)), dtype=torch.int64, device=device)[None]

    def __call__(self, logits: Tensor) -> int:
        """The next token of the sequence.

        Args:
            logits: [vocab] float32, on the sampler's device; not changed.

        Returns:
            The token id, which also counts as part of the sequence from now on.

        Raises:
            LoadError: Logits that are not finite.
        """
        scores = self.process(logits)
        best, token = scores.max(dim=-1)
        if not self._greedy:
            # Weights that are not finite would end in an assertion of the device; they are refused below.
            weights = scores.softmax(dim=-1).nan_to_num(nan=1.0)
            token = torch.multinomial(weights, 1, generator=self._generator)[0]
        if self._seen is not None:
            self._seen = torch.cat((self._seen, token[None]), dim=1)
        # Read at once, so that the host waits once; a float32 holds every id. NaN counts as the largest score.
        highest, drawn = torch.cat((best, token.to(best.dtype))).tolist()
        if not math.isfinite(highest):
            raise LoadError(
                "the model gave logits that are not finite; its weights are damaged, or need a wider dtype "
                "such as --dtype bf16 or fp32"
            )
        return int(drawn)

    def process(self, logits: Tensor) -> Tensor:
        """The logits after every processor: [vocab] float32 in, [1, vocab] float32 out."""
        row = logits[None].float()
        ids = self._seen if self._seen is not None else torch.empty(1, 0, dtype=torch.int64, device=row.device)
        return self._processors(cast(torch.LongTensor, ids), cast(torch.FloatTensor, row))
