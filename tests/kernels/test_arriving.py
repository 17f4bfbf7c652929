"""Attention that fetches its rows gives the bits of a gather followed by attention, and leaves the same rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from arriving_case import make_arriving_case

from ds_offload.kernels.slot_attention_launch import StoredRows

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
# Group, dtype, bits of a value.
KINDS = [(1, F32, 16), (1, BF16, 16), (4, F16, 16), (1, BF16, 4), (4, BF16, 4), (4, F16, 8)]


@pytest.mark.parametrize(("group", "dtype", "bits"), KINDS)
@pytest.mark.parametrize("kept", [1, 150])
def test_rows_are_fetched_before_they_are_read(group: int, dtype: torch.dtype, bits: int, kept: int) -> None:
    case = make_arriving_case(dtype, bits=bits, group=group, kept=kept)
    rows = case.rows.clone()
    assert torch.equal(case.attend(rows, case.fresh()), case.attend(case.whole))
    assert torch.equal(rows.view(torch.uint8), case.whole.view(torch.uint8))
    assert not torch.equal(case.rows.view(torch.uint8), case.whole.view(torch.uint8))


def test_what_does_not_fit_is_refused() -> None:
    case = make_arriving_case(F32)
    good = case.fresh()
    stored = StoredRows(good.table, 1, 2, 32, F32)
    for rows, changes, reason in (
        (case.rows, {"progress": good.progress[:-1]}, "progress"),
        (case.rows, {"progress": good.progress.long()}, "progress"),
        (case.rows, {"counts": good.counts.long()}, "counts"),
        (case.rows, {"tokens": good.tokens[:, :1]}, "tokens"),
        (case.rows, {"layer": 2}, "layer=2"),
        (stored, {}, "need a tensor to arrive in"),
    ):
        with pytest.raises(ValueError, match=reason):
            case.attend(rows, replace(good, **changes))  # type: ignore[arg-type]


def test_triton_kernels_in_the_interpreter(interpret: Callable[[str], None]) -> None:
    interpret("interpreted_arriving.py")


@pytest.mark.gpu
@pytest.mark.parametrize(("group", "dtype", "bits"), KINDS)
@pytest.mark.parametrize(("kv_heads", "kept", "missing"), [(1, 1, 1.0), (3, 400, 0.02), (8, 3000, 0.5), (32, 500, 1.0)])
def test_cuda(group: int, dtype: torch.dtype, bits: int, kv_heads: int, kept: int, missing: float) -> None:
    sizes = {"kv_heads": kv_heads, "kept": kept, "missing": missing, "dim": 128}
    case = make_arriving_case(dtype, bits=bits, group=group, device="cuda", pinned=True, **sizes)
    expected = case.attend(case.whole)
    rows = case.rows.clone()
    for _ in range(20):
        rows.copy_(case.rows)
        arriving = case.fresh(timer=torch.tensor([2**62, 0], device="cuda"))
        torch.cuda.set_sync_debug_mode("error")
        try:
            result = case.attend(rows, arriving)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(result, expected)
        assert torch.equal(rows.view(torch.uint8), case.whole.view(torch.uint8))
        assert torch.equal(arriving.progress[:-1, 0], arriving.counts.flatten())
        began, ended = arriving.timer.tolist()
        assert began < ended < began + 10**9


@pytest.mark.gpu
@pytest.mark.parametrize(("group", "bits"), [(1, 16), (4, 16), (1, 4), (4, 4)])
def test_cuda_the_wait_taken_out_is_noticed(group: int, bits: int) -> None:
    case = make_arriving_case(
        BF16, bits=bits, group=group, kv_heads=16, kept=3000, missing=1.0, dim=128, device="cuda", pinned=True
    )
    expected = case.attend(case.whole)
    # Counted as fetched before anything is: nobody waits.
    case.attend(case.rows.clone(), case.fresh())
    assert not torch.equal(case.attend(case.rows.clone(), case.fresh(progress=case.counted())), expected)


@pytest.mark.gpu
def test_cuda_in_a_graph_beside_other_work() -> None:
    """Replays while another stream keeps the multiprocessors busy."""
    case = make_arriving_case(BF16, kv_heads=8, kept=2000, dim=128, device="cuda", pinned=True)
    expected, rows, progress = case.attend(case.whole), case.rows.clone(), torch.zeros_like(case.arriving.progress)
    case.attend(case.rows.clone(), case.fresh())
    graph, beside = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph):
        rows.copy_(case.rows)
        progress.zero_()
        result = case.attend(rows, case.fresh(progress=progress))
    busy = torch.randn(4096, 4096, device="cuda")
    with torch.cuda.stream(beside):
        for _ in range(20):
            busy = (busy @ busy).clamp(-1, 1)
    for _ in range(100):
        result.zero_()
        graph.replay()
        assert torch.equal(result, expected)
    torch.cuda.synchronize()
