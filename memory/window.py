"""The tokens every step attends to whatever the scores say: sinks, recent window, current token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionWindow:
    """Which tokens are forced, and where the rest, the candidates, begin and end.

    A context of T tokens (the current one included) splits into sinks `[0, sinks)`,
    candidates `[sinks, T - ring)` and the recent ring `[max(sinks, T - ring), T)`.

    Attributes:
        sinks: First tokens of the context.
        recent: Last tokens before the current one.
    """

    sinks: int
    recent: int

    @property
    def ring(self) -> int:
        """Slots of the recent window, the current token's included."""
        return self.recent + 1

    @property
    def forced_slots(self) -> int:
        """Most forced tokens of any context."""
        return self.sinks + self.ring

    def forced(self, length: int) -> int:
        """Forced tokens of a context of `length` tokens."""
        return min(length, self.forced_slots)

    def selected(self, budget: int, length: int) -> int:
        """Candidates kept of a context of `length` tokens when `budget` tokens are kept in all."""
        return max(0, min(budget, length) - self.forced(length))

    def sink_tokens(self, lengths: Tensor) -> Tensor:
        """Sinks `[B, sinks]` int64 of contexts of `lengths` `[B]`; -1 where the context is shorter."""
        tokens = torch.arange(self.sinks, device=lengths.device).expand(len(lengths), -1)
        return torch.where(tokens < lengths[:, None], tokens, -1)

    def recent_tokens(self, lengths: Tensor) -> Tensor:
        """Ring tokens `[B, ring]` int64, ascending, the current one last; -1 where a sink or nothing is."""
        tokens = lengths[:, None] - self.ring + torch.arange(self.ring, device=lengths.device)
        return torch.where(tokens >= self.sinks, tokens, -1)
