"""One prompt on its way to its answer, and what came out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ds_offload.loading import LoadedModel
from ds_offload.sampling import Sampler, SamplingParams
from ds_offload.text_stream import TextStream


@dataclass
class GenerationOutput:
    """What came out of one prompt.

    Attributes:
        text: The answer, special tokens left out, cut before a stop string.
        token_ids: Every new token, the end token included.
        prompt_tokens: Tokens of the prompt.
        finish_reason: "stop" (end token or stop string) or "length".
        stats: Times, bytes and rates of the whole call; see docs/design.md.
        logits: `[new tokens, vocab]` float32 on the CPU with `output_logits=True`.
    """

    text: str
    token_ids: list[int]
    prompt_tokens: int
    finish_reason: str
    stats: dict[str, Any] = field(default_factory=dict)
    logits: Tensor | None = None


class Sequence:
    """One prompt on its way: its tokens, its sampler, its text."""

    def __init__(self, ids: list[int], limit: int, params: SamplingParams, loaded: LoadedModel) -> None:
        self.prompt = ids
        self.limit = limit
        self.tokens: list[int] = []
        self.logits: list[Tensor] = []
        self.finish_reason: str | None = None
        self.stream = TextStream(loaded.tokenizer, tuple(params.stop or ()))
        self._sampler = Sampler(params, ids, loaded.device)
        self._ends = loaded.eos_token_ids

    @property
    def length(self) -> int:
        """Tokens of the context once the newest token has joined it."""
        return len(self.prompt) + len(self.tokens)

    def take(self, logits: Tensor, keep_logits: bool) -> str:
        """Sample the next token from `logits` `[vocab]`; the text that is final now."""
        token = self._sampler(logits)
        self.tokens.append(token)
        if keep_logits:
            self.logits.append(logits.cpu())
        piece = self.stream.push(token)
        if token in self._ends or self.stream.stopped:
            self.finish_reason = "stop"
        elif len(self.tokens) >= self.limit:
            self.finish_reason = "length"
        return piece if self.finish_reason is None else piece + self.stream.finish()

    def output(self, stats: dict[str, Any]) -> GenerationOutput:
        """What came out, once `finish_reason` is there; with a copy of `stats`."""
        assert self.finish_reason is not None
        logits = torch.stack(self.logits) if self.logits else None
        return GenerationOutput(
            self.stream.text, self.tokens, len(self.prompt), self.finish_reason, dict(stats), logits
        )
