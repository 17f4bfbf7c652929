"""What free memory decides of a context is decided for the run as it is for the plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from ds_offload.evaluation.subject import EvalSubject
from ds_offload.evaluation.teacher_forcing import teacher_force
from ds_offload.planning.request import host_total

STEPS = 8

MakeSubject = Callable[..., EvalSubject]


def test_an_open_dtype_is_the_one_that_fits(subject_of: MakeSubject, text: str) -> None:
    subject = subject_of(hot_set=1, kv_dtype="fp32")
    ids = subject.encode(text)[:256]
    needed = host_total(subject.prepared.check([len(ids) - STEPS], [len(ids)]), cuda=False)
    logits: dict[str, list[torch.Tensor]] = {"auto": [], "int8": [], "fp32": []}
    for name, rows in logits.items():
        limit = needed - 1 if name == "auto" else None
        config = dataclasses.replace(subject.config, kv_dtype=name, host_memory=limit)
        teacher_force(subject, config, ids, STEPS, lambda number, row, rows=rows: rows.append(row.clone()))
    auto, int8, fp32 = (torch.stack(rows) for rows in logits.values())
    assert torch.equal(auto, int8)
    assert not torch.equal(auto, fp32)
