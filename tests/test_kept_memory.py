"""Memory that one call leaves for the next: counted, trimmed, taken again, and given back after an error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import random_prompts, save_tiny, tiny_config

from ds_offload import OffloadConfig, OffloadedGenerator
from ds_offload.errors import MemoryPlanError
from ds_offload.memory import page_locking, preparation
from ds_offload.memory.host_block import BlockLayout, HostBlock
from ds_offload.memory_check import memory_limits
from ds_offload.planning.request import MemoryLimits

IDS = random_prompts(150)[0]
CPU = torch.device("cpu")
MIB = 1 << 20


def make(folder: Path, device: str, **changes: Any) -> OffloadedGenerator:
    save_tiny(folder, tiny_config("llama", 2))
    config = {"max_context": 1024, "sink_tokens": 2, "recent_tokens": 4, "token_budget": 16, "segment_tokens": 16}
    return OffloadedGenerator.from_pretrained(str(folder), config=OffloadConfig(**config | changes), device=device)


def keep(gen: OffloadedGenerator, blocks: int) -> None:
    for _ in range(blocks):
        gen.kept.put(HostBlock.map(BlockLayout(MIB), CPU))


def failing(error: type[BaseException]) -> Callable[[str, int, int], None]:
    """A progress callback that raises `error` at the first decode step."""

    def fail(phase: str, done: int, total: int) -> None:
        if phase == "decode":
            raise error

    return fail


def test_what_is_kept_may_be_taken() -> None:
    free = memory_limits(OffloadConfig(), CPU).host
    assert memory_limits(OffloadConfig(), CPU, kept=free).host == pytest.approx(2 * free, rel=0.2)
    assert memory_limits(OffloadConfig(host_memory="1MiB"), CPU, kept=free).host == MIB


def test_a_call_fits_into_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with make(tmp_path, "cpu", hot_set=1) as gen:
        monkeypatch.setattr("ds_offload.memory_check.host_memory", lambda: SimpleNamespace(usable_bytes=0))
        with pytest.raises(MemoryPlanError, match="host memory"):
            gen.plan_call([100], [101])
        keep(gen, 64)
        assert gen.plan_call([100], [101]).host_kv > 0


def test_a_call_leaves_no_more_than_its_plan_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with make(tmp_path, "cpu") as gen:
        keep(gen, 5)
        gen.plan_call([100], [101])
        assert gen.kept.nbytes == 5 * MIB
        monkeypatch.setattr("ds_offload.call_planner.memory_limits", lambda *_: MemoryLimits(None, 3 * MIB + 9))
        gen.plan_call([100], [101])
        assert gen.kept.nbytes == 3 * MIB
    assert gen.kept.nbytes == 0


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_what_is_kept_stays_behind_a_stream_closed_early_and_goes_after_an_error(
    error: type[BaseException], tmp_path: Path
) -> None:
    with make(tmp_path, "cpu") as gen:
        keep(gen, 2)
        streamed = gen.stream(IDS, max_new_tokens=4)
        next(streamed)
        streamed.close()  # type: ignore[attr-defined]
        assert gen.kept.nbytes == 2 * MIB
        with pytest.raises(error):
            gen.generate(IDS, max_new_tokens=4, on_progress=failing(error))
        assert gen.kept.nbytes == 0


@pytest.mark.gpu
@pytest.mark.parametrize("managed", [True, False])
def test_a_second_call_takes_no_memory(managed: bool, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if not managed:
        request.getfixturevalue("page_locked")
    with make(tmp_path, "cuda") as gen:
        first = gen.generate(IDS, max_new_tokens=20)
        held = gen.kept.nbytes
        assert held == first.stats["host_pinned_bytes"] > 0

        def never(*given: object) -> int:
            raise AssertionError("memory was made ready")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(page_locking, "lock_pages", never)
            patch.setattr(preparation, "touch", never)
            second = gen.generate(IDS, max_new_tokens=20)
            streamed = gen.stream(IDS, max_new_tokens=20)
            next(streamed)
            assert gen.kept.nbytes < held
            # Closed early.
            streamed.close()  # type: ignore[attr-defined]
            short = gen.generate(IDS[:40], max_new_tokens=4)
        assert second.token_ids == first.token_ids and gen.kept.nbytes == held
        for name in ("host_pinned_bytes", "host_kv_bytes", "h2d_bytes_per_token"):
            assert second.stats[name] == first.stats[name]
        assert short.stats["host_pinned_bytes"] < held
        with gen.prefill(IDS[:40]) as session:
            assert len(session.ask(IDS[:3], max_new_tokens=2).token_ids) == 2
        assert gen.kept.nbytes == held
    assert gen.kept.nbytes == 0


@pytest.mark.gpu
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_after_an_error_nothing_is_kept(error: type[BaseException], tmp_path: Path) -> None:
    with make(tmp_path, "cuda") as gen:
        expected = gen.generate(IDS, max_new_tokens=4).token_ids
        assert gen.kept.nbytes > 0
        with pytest.raises(error):
            gen.generate(IDS, max_new_tokens=4, on_progress=failing(error))
        assert gen.kept.nbytes == 0
        assert gen.generate(IDS, max_new_tokens=4).token_ids == expected
