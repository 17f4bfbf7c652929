"""What an admission works on and what it gives back."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

# The token of an empty slot: sorts behind every real one.
EMPTY = 2**31 - 1


@dataclass(frozen=True)
class AdmitState:
    """Which token each slot of one layer holds, and since when: int32 [B, Hkv, C] each, changed in place.

    Two orders are kept from admission to admission, so that none has to sort: the
    tokens ascending, and the slots by (stamp of their last selection, slot number).

    Attributes:
        tokens: The tokens held, ascending; `EMPTY` behind them.
        token_slots: Slot of each entry of `tokens`; -1 behind them.
        order: Every slot number, the one to give away first in front.
        selected: By slot: stamp of the last admission that selected its token, 0 if none.
        arrived: By slot: stamp of the admission that brought its token, 0 if none.
    """

    tokens: Tensor
    token_slots: Tensor
    order: Tensor
    selected: Tensor
    arrived: Tensor

    @classmethod
    def empty(cls, batch: int, kv_heads: int, capacity: int, device: torch.device) -> AdmitState:
        """A state of `capacity` empty slots a head."""
        shape = (batch, kv_heads, capacity)
        filled = [torch.full(shape, value, dtype=torch.int32, device=device) for value in (EMPTY, -1, 0, 0, 0)]
        filled[2] += torch.arange(capacity, dtype=torch.int32, device=device)
        return cls(*filled)


@dataclass(frozen=True)
class AdmitResult:
    """Where admitted tokens are.

    Attributes:
        slots: int64 [B, Hkv, K], the slot of each token, 0 to C - 1; 0 for padding.
        missing: int64 [B, Hkv, K], the token where its row must be fetched into its
            slot, else -1.
        moved: int32 [B, Hkv], entries of `missing` that are tokens.
        old: int32 [B, Hkv], tokens that were there and had arrived before `began`.
    """

    slots: Tensor
    missing: Tensor
    moved: Tensor
    old: Tensor


def empty_result(tokens: Tensor) -> AdmitResult:
    """A result for `tokens` [B, Hkv, K], not filled."""
    heads = tokens.shape[:2]
    slots, missing = (torch.empty(tokens.shape, dtype=torch.int64, device=tokens.device) for _ in range(2))
    moved, old = (torch.empty(heads, dtype=torch.int32, device=tokens.device) for _ in range(2))
    return AdmitResult(slots, missing, moved, old)


def disorder(row: int) -> str:
    """What is wrong with tokens that do not ascend, the first in `row` of B * Hkv."""
    return f"row {row} of tokens must be below {EMPTY} and ascend without repeats, with -1 only behind the last"


def check_admit(state: AdmitState, tokens: Tensor, clock: Tensor, began: Tensor) -> None:
    """Raise ValueError unless shapes, dtypes and devices are those of `admit_tokens`."""
    shape, device = state.tokens.shape, state.tokens.device
    if tokens.dtype != torch.int64 or tokens.dim() != 3 or tokens.shape[:2] != shape[:2]:
        raise ValueError(
            f"tokens {tokens.dtype} {tuple(tokens.shape)} must be int64 [{shape[0]}, {shape[1]}, K] like the state"
        )
    if tokens.shape[2] > shape[2]:
        raise ValueError(f"{tokens.shape[2]} tokens a row need as many slots; the state has {shape[2]}")
    for field in fields(state):
        value = getattr(state, field.name)
        if value.dtype != torch.int32 or value.shape != shape or not value.is_contiguous() or value.device != device:
            raise ValueError(
                f"state.{field.name} {value.dtype} {tuple(value.shape)} on {value.device} must be int32 "
                f"{tuple(shape)}, contiguous, on {device}"
            )
    for name, value in (("clock", clock), ("began", began)):
        if value.dtype != torch.int32 or value.dim() != 0:
            raise ValueError(f"{name} {value.dtype} {tuple(value.shape)} must be an int32 scalar")
    for name, value in (("tokens", tokens), ("clock", clock), ("began", began)):
        if value.device != device:
            raise ValueError(f"{name} is on {value.device}; it must be on {device} like the state")
