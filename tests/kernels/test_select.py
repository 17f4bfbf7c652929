"""Selected tokens against a plain sort; every result is exact."""

from __future__ import annotations

import math
import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ds_offload.kernels import select
from ds_offload.kernels.select import (
    SelectLaunch,
    select_launch,
    select_tokens,
    select_tokens_reference,
    top_tokens,
)

Case = tuple[Tensor, int, Tensor, Tensor, int]


def naive(scores: Tensor, first: int, last: Tensor, keep: Tensor, count: int) -> Tensor:
    batch, heads, length = scores.shape
    out = torch.full((batch, heads, count), -1)
    for b in range(batch):
        for h in range(heads):
            row = scores[b, h].tolist()
            none = -math.inf if scores.is_floating_point() else -1
            candidates = [t for t in range(first, min(int(last[b]), length)) if row[t] > none]
            # -0.0 is below 0.0.
            candidates.sort(key=lambda t, row=row: (-row[t], math.copysign(1, row[t]) < 0 and row[t] == 0, t))
            wanted = int(keep[b] if keep.dim() == 1 else keep[b, h])
            kept = sorted(candidates[: max(0, min(wanted, count))])
            out[b, h, : len(kept)] = torch.tensor(kept, dtype=torch.int64)
    return out


def make_scores(kind: str, batch: int, heads: int, length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(batch, heads, length, generator=generator)
    if kind == "weights":
        return (scores * 4).softmax(-1)
    if kind == "ties":
        return (scores * 4).round() / 4
    if kind == "few":
        scores = scores.round() * torch.where(torch.rand(scores.shape, generator=generator) < 0.5, -1.0, 1.0)
        return scores.masked_fill(torch.rand(scores.shape, generator=generator) < 0.4, -torch.inf)
    if kind == "equal":
        return torch.full_like(scores, -2.5)
    if kind == "none":
        return torch.full_like(scores, -torch.inf)
    if kind == "extreme":
        values = torch.tensor([torch.inf, 3.4e38, 1e-45, 0.0, -0.0, -1e-45, -3.4e38, -torch.inf])
        return values[torch.randint(8, scores.shape, generator=generator)]
    if kind == "ascending":
        return scores.sort(-1).values
    if kind == "whole":
        # As of product codes: some hundreds of numbers, -1 where there is no label; and the largest of all.
        whole = (scores * 20 + 60).clamp(-1, 32767).to(torch.int16)
        return whole.masked_fill(torch.rand(scores.shape, generator=generator) < 0.001, 32767)
    if kind == "whole and few":
        return torch.randint(-2, 2, scores.shape, generator=generator, dtype=torch.int16)
    assert kind == "normal"
    return scores


KINDS = ("normal", "weights", "ties", "few", "equal", "none", "extreme", "ascending", "whole", "whole and few")
SHAPES = [
    # B, Hkv, T, first, last, keep, count
    (1, 1, 1, 0, [1], [1], 1),
    (1, 1, 1, 1, [1], [1], 3),
    (3, 2, 37, 4, [37, 4, -3], [5, 5, 5], 5),
    (3, 1, 64, 0, [64, 1, 999], [0, 7, 64], 64),
    (2, 3, 129, 5, [100, 129], [[1, 0, 200], [-4, 60, 30]], 77),
    (2, 1, 50, 3, [40, 20], [50, 50], 90),
    (1, 2, 300, 60, [290], [[17, 120]], 130),
    (2, 1, 20, 30, [20, 25], [5, 5], 4),
]


def make_case(kind: str, shape: tuple, seed: int = 0) -> Case:
    batch, heads, length, first, last, keep, count = shape
    return make_scores(kind, batch, heads, length, seed), first, torch.tensor(last), torch.tensor(keep), count


def poisoned(case: Case, device: str = "cpu") -> Tensor:
    return torch.full((*case[0].shape[:2], case[4]), -77, device=device)


def assert_selects(function: Callable, case: Case, expected: Tensor) -> None:
    out = poisoned(case, case[0].device.type)
    function(*case, out=out)
    assert torch.equal(out.cpu(), expected.cpu())


def narrow_launches() -> dict[str, SelectLaunch]:
    """Several programs per short row: brackets that miss, lists that overflow, and a bracket that is exact."""
    return {
        "usual": SelectLaunch(block=0, warps=4, sample=16, listed=64, chunk=32, width=4),
        "misses": SelectLaunch(block=0, warps=4, sample=32, listed=8, chunk=64, width=2),
        "overflows": SelectLaunch(block=0, warps=4, sample=16, listed=2, chunk=64, width=16),
        "exact": SelectLaunch(block=0, warps=4, sample=128, listed=512, chunk=64, width=16),
    }


if os.environ.get("TRITON_INTERPRET") == "1":
    # Run by test_triton_kernels_in_the_interpreter; no other process can run it.

    class TestInterpreted:
        @pytest.mark.parametrize(
            ("launch", "kind"),
            [("row", kind) for kind in KINDS]
            + [("usual", kind) for kind in KINDS]
            + [
                (launch, kind)
                for launch in ("misses", "overflows", "exact")
                for kind in ("normal", "few", "extreme", "whole")
            ],
        )
        def test_equals_the_reference(self, launch: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
            knobs = SelectLaunch(block=512, warps=4) if launch == "row" else narrow_launches()[launch]
            monkeypatch.setattr(select, "select_launch", lambda *sizes: knobs)
            for shape in SHAPES if launch == "row" else SHAPES[KINDS.index(kind) % 2 :: 2]:
                case = make_case(kind, shape)
                out = poisoned(case)
                select._launch(*case, out)
                assert torch.equal(out, select_tokens_reference(*case)), shape

        @pytest.mark.parametrize("kind", ["weights", "whole"])
        def test_the_launch_of_long_rows(self, kind: str) -> None:
            case = make_case(kind, (1, 2, 20001, 4, [19990], [[1250, 9000]], 9001))
            out = poisoned(case)
            select._launch(*case, out)
            assert torch.equal(out, select_tokens_reference(*case))


@pytest.mark.parametrize("function", [select_tokens, select_tokens_reference])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_a_plain_sort(kind: str, shape: tuple, function: Callable) -> None:
    case = make_case(kind, shape)
    assert_selects(function, case, naive(*case))


def test_ties_and_zeros_by_hand() -> None:
    scores = torch.tensor([[[0.0, -0.0, 1.0, -torch.inf, 1.0, 0.0, 1.0, 9.0]]])
    for keep, expected in ((2, [2, 4]), (4, [0, 2, 4, 6]), (5, [0, 2, 4, 5, 6]), (6, [0, 1, 2, 4, 5, 6])):
        for function in (select_tokens, select_tokens_reference):
            tokens = function(scores, 0, torch.tensor([7]), torch.tensor([keep]), 7)
            assert tokens.tolist() == [[expected + [-1] * (7 - keep)]]


def test_the_cpu_equals_the_reference_on_long_rows() -> None:
    for kind in ("normal", "ties", "few", "weights", "whole"):
        case = make_case(kind, (2, 2, 30011, 4, [29000, 17], [1800, 9], 1900))
        assert_selects(select_tokens, case, select_tokens_reference(*case))


@pytest.mark.parametrize("function", [select_tokens, select_tokens_reference])
def test_nothing_to_select(function: Callable) -> None:
    none, one = torch.zeros(0, dtype=torch.int64), torch.ones(1, dtype=torch.int64)
    assert function(torch.zeros(0, 2, 5), 0, none, none, 3).shape == (0, 2, 3)
    assert function(torch.zeros(1, 2, 5), 0, one, one, 0).shape == (1, 2, 0)
    assert function(torch.zeros(1, 2, 0), 0, one, one, 2).tolist() == [[[-1, -1], [-1, -1]]]


def test_top_tokens_is_a_stable_descending_sort() -> None:
    scores = make_scores("ties", 2, 3, 500) + 0.0  # no -0.0, which a float sort takes for equal
    expected = scores.sort(dim=-1, descending=True, stable=True).indices
    assert torch.equal(top_tokens(scores, 500), expected)
    assert torch.equal(top_tokens(scores, 33), expected[..., :33])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": torch.zeros(1, 2, 5, dtype=torch.float16)}, "scores .* must be float32 or int16"),
        ({"scores": torch.zeros(1, 5, 2).mT}, "contiguous"),
        ({"last": torch.tensor([5], dtype=torch.int32)}, "last .* must be int64"),
        ({"last": torch.tensor([5, 5])}, "last .* must be int64"),
        ({"keep": torch.tensor([[1]])}, "keep .* must be int64"),
        ({"first": -1}, "first=-1 and count=3 must not be negative"),
        ({"count": -1}, "count=-1 must not be negative"),
        ({"out": torch.zeros(1, 2, 4, dtype=torch.int64)}, r"out .* must be int64 \(1, 2, 3\)"),
        ({"out": torch.zeros(1, 2, 3)}, "out torch.float32"),
        ({"keep": torch.ones(1, dtype=torch.int64, device="meta")}, "keep is on meta"),
    ],
)
def test_wrong_arguments_are_named(change: dict, message: str) -> None:
    arguments = {
        "scores": torch.zeros(1, 2, 5),
        "first": 0,
        "last": torch.tensor([5]),
        "keep": torch.tensor([2]),
        "count": 3,
    }
    select_tokens(**arguments)
    with pytest.raises(ValueError, match=message):
        select_tokens(**(arguments | change))


@pytest.mark.parametrize("length", [0, 1, 4096, 4097, 16384, 16385, 1 << 18, (1 << 18) + 1, 1 << 21])
@pytest.mark.parametrize("share", [0, 1 / 256, 1 / 16, 1 / 4, 1])
def test_launch_fits_the_kernels(length: int, share: float) -> None:
    launch = select_launch(length, int(share * length))
    assert launch.block == 0 or launch.block >= length
    assert launch.chunk < 1 << 15 and launch.listed < 1 << 16
    for size in (launch.block or 1, launch.warps, launch.sample, launch.listed, launch.chunk, launch.width):
        assert size & (size - 1) == 0


def test_triton_kernels_in_the_interpreter(interpret: Callable[[str], None]) -> None:
    interpret("test_select.py::TestInterpreted")


def on_cuda(case: Case) -> Case:
    scores, first, last, keep, count = case
    return scores.cuda(), first, last.cuda(), keep.cuda(), count


@pytest.mark.gpu
@pytest.mark.parametrize("launch", ["", *narrow_launches()])
@pytest.mark.parametrize("kind", KINDS)
def test_cuda(kind: str, launch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if launch:
        monkeypatch.setattr(select, "select_launch", lambda *sizes: narrow_launches()[launch])
    for shape in SHAPES:
        case = make_case(kind, shape)
        assert_selects(select_tokens, on_cuda(case), naive(*case))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("batch", "heads", "length"),
    [(1, 3, 8192), (2, 2, 16384), (1, 3, 16387), (3, 2, 65536), (1, 32, 262144), (1, 8, 1 << 20), (1, 1, 1000001)],
)
def test_cuda_long_rows(batch: int, heads: int, length: int, kind: str) -> None:
    scores = make_scores(kind, batch, heads, length).cuda()
    last = torch.tensor([length - 60, 40, length][:batch], device="cuda")
    for share in (1 / 1000, 1 / 16, 1 / 2, 1.0):
        keep = (share * length * torch.rand(batch, heads)).long().cuda() if share == 1 / 2 else None
        count = int(share * length)
        case = (scores, 4, last, torch.full_like(last, count) if keep is None else keep, count)
        expected = select_tokens_reference(*case)
        out = poisoned(case, "cuda")
        torch.cuda.set_sync_debug_mode("error")
        try:
            select_tokens(*case, out=out)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(out, expected)


@pytest.mark.gpu
def test_cuda_scores_beyond_2_to_31_elements() -> None:
    length, heads = 2**28 + 3, 9
    if torch.cuda.mem_get_info()[0] < 4 * heads * length + 2**30:
        pytest.skip(f"needs {4 * heads * length / 2**30 + 1:.1f} GiB of free GPU memory")
    scores = torch.full((1, heads, length), -torch.inf, device="cuda")
    wanted = torch.tensor([7, 2**27 + 1, 2**28 - 5, length - 2], device="cuda")
    scores[:, :, wanted] = torch.tensor([1.0, 3.0, 2.0, 1.0], device="cuda")
    case = (scores, 4, torch.tensor([length - 1], device="cuda"), torch.tensor([3], device="cuda"), 5)
    tokens = select_tokens(*case, out=poisoned(case, "cuda"))
    assert (tokens[..., :3] == wanted[:3]).all() and (tokens[..., 3:] == -1).all()


@pytest.mark.gpu
@pytest.mark.parametrize("length", [3000, 40000])
def test_cuda_graph_follows_the_inputs_it_is_replayed_with(length: int) -> None:
    case = on_cuda(make_case("ties", (2, 3, length, 4, [length, 500], [700, 90], 800)))
    out = poisoned(case, "cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        select_tokens(*case, out=out)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        select_tokens(*case, out=out)
    for seed, (last, keep) in enumerate((([length, 900], [700, 90]), ([0, length - 7], [5, 800]))):
        case[0].copy_(make_scores(("weights", "few")[seed], 2, 3, length, seed + 1))
        case[2].copy_(torch.tensor(last))
        case[3].copy_(torch.tensor(keep))
        out.fill_(-77)
        graph.replay()
        assert torch.equal(out, select_tokens_reference(*case))
