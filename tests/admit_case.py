"""Admissions compared: states and results, where they are defined."""

from __future__ import annotations

from dataclasses import fields

import torch

from ds_offload.kernels.admit_state import AdmitResult, AdmitState

CPU = torch.device("cpu")


def same_state(ours: AdmitState, theirs: AdmitState) -> bool:
    """Whether two states are the same, bit for bit, where they are defined."""
    left = torch.arange(ours.queue.shape[2], device=ours.queue.device)
    left = (left >= ours.marks[..., :1]) & (left < ours.marks[..., 1:2])
    pairs = [(getattr(ours, field.name), getattr(theirs, field.name)) for field in fields(ours)]
    pairs = [(a[left], b[left]) if a is ours.queue else (a, b) for a, b in pairs]
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def same_result(ours: AdmitResult, theirs: AdmitResult) -> bool:
    """Whether two results are the same, bit for bit, where they are defined."""
    listed = torch.arange(ours.missing.shape[2], device=ours.moved.device) < ours.moved[..., None]
    return (
        torch.equal(ours.places, theirs.places)
        and torch.equal(ours.moved, theirs.moved)
        and torch.equal(ours.missing[listed], theirs.missing[listed])
        and torch.equal(ours.missing_places[listed], theirs.missing_places[listed])
    )


def scalar(value: int, device: str = "cpu") -> torch.Tensor:
    return torch.tensor(value, dtype=torch.int32, device=device)
