"""Attention that fetches its rows, in Triton's interpreter; run by test_arriving.py under TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch
from arriving_case import SCALING, ArrivingCase, make_arriving_case

from ds_offload.kernels import arriving as arriving_module
from ds_offload.kernels import coded_attention, slot_attention
from ds_offload.kernels.arriving import Arriving
from ds_offload.kernels.gather import GatherLaunch

F32, F16 = torch.float32, torch.float16


def run(case: ArrivingCase, rows: torch.Tensor, arriving: Arriving | None = None) -> torch.Tensor:
    out = torch.full_like(case.query, torch.nan)
    if case.code is None:
        slot_attention._launch(case.query, rows, case.slots, SCALING, out, arriving)
    else:
        rest = (case.code, case.slots, SCALING, out, arriving)
        coded_attention._launch(case.query, case.window, rows, *rest)
    return out


@pytest.mark.parametrize(
    ("group", "dtype", "bits"), [(1, F32, 16), (1, F16, 16), (3, F16, 16), (1, F32, 4), (3, F16, 8)]
)
@pytest.mark.parametrize("programs", [1, 3])
def test_the_launch_fetches_what_it_reads(
    group: int, dtype: torch.dtype, bits: int, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arriving_module, "gather_launch", lambda *args: GatherLaunch(programs, 16, 4))
    case = make_arriving_case(dtype, bits=bits, group=group)
    expected = run(case, case.whole)
    assert not expected.isnan().any() and not torch.equal(case.rows, case.whole)
    arriving = case.fresh()
    rows = case.rows.clone()
    assert torch.equal(run(case, rows, arriving), expected)
    assert torch.equal(rows.view(torch.uint8), case.whole.view(torch.uint8))
    assert torch.equal(arriving.progress[:-1, 0], case.arriving.counts.flatten())


def test_nothing_is_missing() -> None:
    case = make_arriving_case(F32, kept=20)
    arriving = case.fresh(counts=torch.zeros_like(case.arriving.counts))
    rows = case.whole.clone()
    assert torch.equal(run(case, rows, arriving), run(case, case.whole))
    assert torch.equal(rows, case.whole) and not arriving.progress[:-1].any()


def test_a_head_that_is_taken_for_fetched_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tests on a GPU take away to see that the wait is needed."""
    monkeypatch.setattr(arriving_module, "gather_launch", lambda *args: GatherLaunch(1, 16, 4))
    case = make_arriving_case(F32)
    assert torch.equal(run(case, case.rows.clone(), case.fresh(progress=case.counted())), run(case, case.whole))
