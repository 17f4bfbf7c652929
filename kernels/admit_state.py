"""What an admission works on and what it gives back."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

# The token of an empty slot, and the slot of a token that has none.
NONE = -1
# The most slots whose numbers are kept in 16 bits.
MOST_SHORT_SLOTS = 2**15 - 1


def listed_slots(capacity: int) -> int:
    """Slots to give away that an admission lists at least, where there are so many."""
    return max(1, capacity // 8)


def page_dtype(capacity: int) -> torch.dtype:
    """How slot numbers below `capacity` are kept: int16 where they fit, else int32."""
    return torch.int16 if capacity <= MOST_SHORT_SLOTS else torch.int32


@dataclass(frozen=True)
class AdmitState:
    """Which token each slot of one layer holds, and since when; changed in place.

    Stamps are of admissions: 0 is none yet. The next slots to give away are listed for
    several admissions at once, since finding them reads every slot's stamp.

    Attributes:
        page: Slot of every token of the context, -1 if it has none: int16 or int32 [B, Hkv, T].
        tokens: Token of every slot, -1 if it is empty: int32 [B, Hkv, C].
        selected: Stamp of the last admission that selected the slot's token: int32 [B, Hkv, C].
        queue: Slots to give away, the first in front: int32 [B, Hkv, C].
        marks: Of the queue, int32 [B, Hkv, 4]: entries taken from its front, its length,
            the stamp of the admission that listed it, and the highest stamp in it then.
            An entry that was selected since is passed over.
    """

    page: Tensor
    tokens: Tensor
    selected: Tensor
    queue: Tensor
    marks: Tensor

    @classmethod
    def empty(cls, batch: int, kv_heads: int, capacity: int, context: int, device: torch.device) -> AdmitState:
        """A state of `capacity` empty slots a head, for tokens below `context`."""
        heads = (batch, kv_heads)
        selected, queue = (torch.zeros(*heads, capacity, dtype=torch.int32, device=device) for _ in range(2))
        return cls(
            page=torch.full((*heads, context), NONE, dtype=page_dtype(capacity), device=device),
            tokens=torch.full((*heads, capacity), NONE, dtype=torch.int32, device=device),
            selected=selected,
            queue=queue,
            marks=torch.zeros(*heads, 4, dtype=torch.int32, device=device),
        )

    def clear(self, stamp: Tensor | None = None) -> None:
        """Empty every slot; later admissions go on counting their stamps.

        Args:
            stamp: Of the last admission, int32 scalar on the device: empty slots count as of it, so that the next list
                does not begin its count of stamps at 0.
        """
        self.page.fill_(NONE)
        self.tokens.fill_(NONE)
        for numbers in (self.selected, self.queue, self.marks):
            numbers.zero_()
        if stamp is not None:
            self.selected.copy_(stamp)
            self.marks[..., 3].copy_(stamp)


@dataclass(frozen=True)
class AdmitResult:
    """Where admitted tokens are, and which of their rows must be fetched.

    Attributes:
        places: int64 [B, Hkv, K], the place of each token; -1 for padding.
        missing: int64 [B, Hkv, K]: the first `moved` entries of a head are the tokens
            to fetch, in the order in which they were given; the others are not written.
        missing_places: int64 [B, Hkv, K]: where to.
        moved: int32 [B, Hkv], the number of tokens to fetch.
        progress: int32 [B * Hkv + 1, 32], the first of each 32 is 0: for whoever fetches them (`kernels/arriving.py`).
    """

    places: Tensor
    missing: Tensor
    missing_places: Tensor
    moved: Tensor
    progress: Tensor


def result_for(tokens: Tensor, places: Tensor | None) -> AdmitResult:
    """A result for `tokens` [B, Hkv, K], not filled; `places` is taken if given."""
    fresh = [torch.empty(tokens.shape, dtype=torch.int64, device=tokens.device) for _ in range(2 + (places is None))]
    moved = torch.empty(tokens.shape[:2], dtype=torch.int32, device=tokens.device)
    # On CUDA the kernel that settles writes the zeros.
    make = torch.empty if tokens.is_cuda else torch.zeros
    progress = make(moved.numel() + 1, 32, dtype=torch.int32, device=tokens.device)
    return AdmitResult(places if places is not None else fresh[2], fresh[0], fresh[1], moved, progress)


def check_admit(
    state: AdmitState,
    tokens: Tensor,
    clock: Tensor,
    recent: Tensor,
    places: Tensor | None,
    counts: Tensor | None,
) -> None:
    """Raise ValueError unless shapes, dtypes and devices are those of `admit_tokens`."""
    heads, capacity, device = state.tokens.shape[:2], state.tokens.shape[-1], state.tokens.device
    if tokens.dtype != torch.int64 or tokens.dim() != 3 or tokens.shape[:2] != heads:
        raise ValueError(
            f"tokens {tokens.dtype} {tuple(tokens.shape)} must be int64 [{heads[0]}, {heads[1]}, K] like the state"
        )
    if tokens.shape[2] > capacity:
        raise ValueError(f"{tokens.shape[2]} tokens a row need as many slots; the state has {capacity}")
    shapes = {"page": (*heads, state.page.shape[-1]), "marks": (*heads, 4)}
    for field in fields(state):
        value = getattr(state, field.name)
        dtype = page_dtype(capacity) if field.name == "page" else torch.int32
        shape = shapes.get(field.name, (*heads, capacity))
        if value.dtype != dtype or value.shape != shape or not value.is_contiguous() or value.device != device:
            raise ValueError(
                f"state.{field.name} {value.dtype} {tuple(value.shape)} on {value.device} must be {dtype} "
                f"{shape}, contiguous, on {device}"
            )
    stamps = [("clock", clock), ("recent", recent)]
    for name, value in stamps:
        if value.dtype != torch.int32 or value.dim() != 0:
            raise ValueError(f"{name} {value.dtype} {tuple(value.shape)} must be an int32 scalar")
    given = [("tokens", tokens), *stamps]
    if places is not None:
        given.append(("places", places))
        if places.dtype != torch.int64 or places.shape != tokens.shape or not _rows_apart(places):
            raise ValueError(
                f"places {places.dtype} {tuple(places.shape)} with strides {places.stride()} must be int64 "
                f"{tuple(tokens.shape)}, its rows contiguous and one distance apart"
            )
    if counts is not None:
        given.append(("counts", counts))
        if counts.dtype != torch.int64 or counts.shape != (*heads, 4) or not counts.is_contiguous():
            raise ValueError(f"counts {counts.dtype} {tuple(counts.shape)} must be int64 {(*heads, 4)}, contiguous")
    for name, value in given:
        if value.device != device:
            raise ValueError(f"{name} is on {value.device}; it must be on {device} like the state")


def _rows_apart(places: Tensor) -> bool:
    """Whether the heads of [B, Hkv, K] lie one stride apart, all B * Hkv of them, each contiguous."""
    between_sequences, between_heads, between = places.stride()
    return (between == 1 or places.shape[2] <= 1) and (
        places.shape[0] <= 1 or between_sequences == places.shape[1] * between_heads
    )
