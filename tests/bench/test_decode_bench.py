"""Contexts without a prompt, and what each variant of the decode benchmark changes about them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tiny_models import save_tiny, tiny_config
from torch import Tensor

from ds_offload.bench.decode_steps import StepTimes, time_steps
from ds_offload.bench.decode_variants import VARIANTS, apply_variant, choose_variants
from ds_offload.bench.filled_context import FilledRows, filled_context
from ds_offload.bench.paper_mechanism import TopKSelector
from ds_offload.bench.selections import ReplayedSelections
from ds_offload.calibration import Calibration
from ds_offload.codebooks import random_codes
from ds_offload.config import OffloadConfig
from ds_offload.decode import DecodeLoop
from ds_offload.decoder import DecoderStack
from ds_offload.errors import InputError
from ds_offload.kv_context import KVContext
from ds_offload.loading import LoadedModel, find_model, load_weights
from ds_offload.prefetch.selection import Step

CPU = torch.device("cpu")
SEQUENCES, TOKENS, WARM_UPS, STEPS = 2, 300, 3, 4
CAPACITY = TOKENS + WARM_UPS + STEPS
KEPT, WINDOW = 40, 2 + 5


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tmp_path_factory.mktemp("model")
    save_tiny(folder, tiny_config("llama", 2))
    return load_weights(find_model(str(folder), load_format="dummy", dtype="fp32"), CPU)


@pytest.fixture(scope="module")
def calibration(loaded: LoadedModel) -> Calibration:
    shape = loaded.source.shape
    ranks = torch.rand(shape.layers, shape.kv_heads, shape.head_dim, generator=torch.Generator().manual_seed(0))
    return Calibration.rank(
        ranks, torch.zeros_like(ranks), None, random_codes(*ranks.shape), fingerprint="", tokens=0, text=""
    )


@pytest.fixture(scope="module")
def config(loaded: LoadedModel) -> OffloadConfig:
    shape = loaded.source.shape
    given = OffloadConfig(
        max_context=CAPACITY, token_budget=KEPT + WINDOW, sink_tokens=2, recent_tokens=4, segment_tokens=64, hot_set=2
    )
    return given.resolve(head_dim=shape.head_dim, layers=shape.layers, trained_context=512)


@pytest.fixture(scope="module")
def filled(loaded: LoadedModel, config: OffloadConfig) -> Iterator[FilledRows]:
    with FilledRows(DecoderStack(loaded.model), config, SEQUENCES, CAPACITY) as rows:
        yield rows


@pytest.fixture(scope="module")
def selections(loaded: LoadedModel) -> ReplayedSelections:
    shape = (SEQUENCES, loaded.source.shape.kv_heads)
    return ReplayedSelections.draw(WARM_UPS + STEPS, shape, KEPT, (2, TOKENS + 1 - 5), CPU)


@dataclasses.dataclass
class Bench:
    loaded: LoadedModel
    config: OffloadConfig
    calibration: Calibration
    filled: FilledRows
    selections: ReplayedSelections | None

    @contextmanager
    def context(self, name: str, **changes: Any) -> Iterator[tuple[DecoderStack, KVContext]]:
        decoder = DecoderStack(self.loaded.model)
        config = dataclasses.replace(self.config, **(changes | VARIANTS[name].changes))
        sizes = {"sequences": SEQUENCES, "tokens": TOKENS, "capacity": CAPACITY}
        with filled_context(decoder, config, self.calibration, self.filled, **sizes) as context:
            apply_variant(VARIANTS[name], decoder, context, self.selections, TOKENS)
            yield decoder, context

    def times(self, name: str, **changes: Any) -> StepTimes:
        with self.context(name, **changes) as (decoder, context):
            return time_steps(decoder, context, [TOKENS] * SEQUENCES, WARM_UPS, STEPS)

    def logits(self, name: str, **changes: Any) -> Tensor:
        with self.context(name, **changes) as (decoder, context), torch.no_grad():
            loop = DecodeLoop(decoder, context)
            steps = [loop.step([5, 6], [TOKENS + 1 + n] * SEQUENCES).clone() for n in range(WARM_UPS + STEPS)]
        return torch.stack(steps)

    @property
    def rows_of_a_step(self) -> int:
        shape = self.loaded.source.shape
        return shape.layers * SEQUENCES * shape.kv_heads


@pytest.fixture
def bench(
    loaded: LoadedModel,
    config: OffloadConfig,
    calibration: Calibration,
    filled: FilledRows,
    selections: ReplayedSelections,
) -> Bench:
    return Bench(loaded, config, calibration, filled, selections)


@pytest.mark.parametrize("location", ["host", "gpu"])
@pytest.mark.parametrize("kv_dtype", ["int8", "int4"])
def test_quantised_rows_are_random_and_finite(bench: Bench, kv_dtype: str, location: str) -> None:
    config = dataclasses.replace(bench.config, kv_dtype=kv_dtype, kv_location=location)
    with FilledRows(DecoderStack(bench.loaded.model), config, SEQUENCES, CAPACITY) as rows:
        quantised = dataclasses.replace(bench, config=config, filled=rows)
        with quantised.context("ours") as (decoder, context):
            assert rows.nbytes == context.store.nbytes
            size = (decoder.kv_heads, TOKENS, 2)
            coded = torch.empty(*size, context.store.prompt_shape(1)[-1], dtype=torch.uint8)
            context.store.read(1, 1, 0, coded)
            assert context.codec is not None and context.window_buffer is not None
            numbers = context.codec.decode(1, coded, torch.empty(*size, decoder.head_dim))
            assert 0.08 < numbers.std() < 0.12
            place = context.window_buffer.places(torch.tensor([[TOKENS - 1]]))
            assert torch.equal(context.window_buffer.tensor(1)[1, :, place[0, 0]], numbers[:, -1])
        for name in ("ours",) if location == "gpu" else ("ours", "paper", "no-hot-set"):
            assert quantised.logits(name).isfinite().all()


def test_contexts_share_rows_that_are_random_and_finite(bench: Bench) -> None:
    segments = []
    for _ in range(2):
        with bench.context("ours") as (_, context):
            table = context.store.table
            segments.append([segment.data_ptr() for part in table.tensors for segment in part])
            assert len(table.tensors[0]) == len(table.tensors[1]) == -(-CAPACITY // 64)
            for segment in table.tensors[0] + table.tensors[1]:
                assert segment.isfinite().all() and 0.05 < float(segment.std()) < 0.2
            assert context.labels.rows.float().std() > 10
            assert context.host_bytes == 0, "no rows of its own"
    assert segments[0] == segments[1] and len(set(segments[0])) == len(segments[0])


def test_the_paper_fetches_every_attended_row_at_every_step(bench: Bench) -> None:
    times = bench.times("paper")
    assert times.traffic.moved == times.traffic.selected == STEPS * bench.rows_of_a_step * KEPT
    assert times.traffic.hit_rate == 0 and times.traffic.recall is None


def test_what_is_not_fetched_is_what_the_hot_set_holds(bench: Bench) -> None:
    times = bench.times("prefetch-off", hot_set=100.0)
    tokens = bench.selections.tokens
    # A hot set of everything: a row moves when it is selected for the first time.
    seen = torch.zeros(*tokens.shape[1:3], CAPACITY, dtype=torch.bool)
    new = []
    for selected in tokens:
        new.append(int((~seen.gather(-1, selected)).sum()))
        seen.scatter_(-1, selected, True)
    layers = bench.loaded.source.shape.layers
    assert times.traffic.moved == layers * sum(new[WARM_UPS:])
    assert times.traffic.selected == STEPS * bench.rows_of_a_step * KEPT
    assert times.traffic.old == times.traffic.selected - times.traffic.moved


def test_the_recall_is_that_of_the_replayed_look_ahead(bench: Bench) -> None:
    times = bench.times("prefetch-exact")
    pairs = zip(bench.selections.tokens[WARM_UPS:], bench.selections.ahead[WARM_UPS - 1 : -1], strict=True)
    hits = sum(
        int(torch.isin(a, b).sum())
        for now, ahead in pairs
        for a, b in zip(now.flatten(0, 1), ahead.flatten(0, 1), strict=True)
    )
    assert times.traffic.recall == pytest.approx(hits / (STEPS * bench.selections.tokens[0].numel()))


def test_with_a_hot_set_less_moves_than_without(bench: Bench) -> None:
    ours, without = bench.times("ours"), bench.times("no-hot-set")
    assert 0 < ours.traffic.moved < without.traffic.moved
    assert without.traffic.moved >= without.traffic.selected and without.traffic.hit_rate == 0


@pytest.mark.parametrize("name", ["unsorted", "no-hot-set", "prefetch-exact", "prefetch-off", "no-graph"])
def test_what_changes_only_the_time_gives_the_same_bits(bench: Bench, name: str) -> None:
    assert torch.equal(bench.logits(name), bench.logits("ours"))


def test_the_paper_attends_to_the_same_rows(bench: Bench) -> None:
    torch.testing.assert_close(bench.logits("paper"), bench.logits("ours"), rtol=1e-4, atol=1e-4)
    assert not torch.equal(bench.logits("prefetch-speculative"), bench.logits("ours"))


def test_without_copies_the_rows_are_not_there(bench: Bench) -> None:
    with bench.context("compute-only") as (decoder, context):
        out = torch.full((SEQUENCES, decoder.kv_heads, 8, 2, decoder.head_dim), 7.0)
        tokens = torch.arange(8).expand(SEQUENCES, decoder.kv_heads, -1).contiguous()
        context.store.gather(0, tokens, tokens, out)
        assert (out == 7).all()


@pytest.mark.parametrize("name", list(VARIANTS))
def test_every_variant_runs_on_what_its_own_scores_select(bench: Bench, name: str) -> None:
    bench.selections = None
    times = bench.times(name)
    assert 0 < times.timing.p20 <= times.timing.median <= times.timing.p80 and times.cpu_use > 0


def test_top_k_selects_what_the_selector_selects(bench: Bench) -> None:
    bench.selections = None
    with bench.context("ours") as (decoder, context):
        step = Step.make([TOKENS, TOKENS - 30], [KEPT, KEPT], context.window, CPU)
        query = torch.randn(SEQUENCES, decoder.heads, decoder.head_dim)
        expected = context.scheduler.selector.select(1, query, step).tokens
        found = TopKSelector(context, decoder.scaling).select(1, query, step).tokens
        assert torch.equal(found.sort(-1).values, expected)
        assert not torch.equal(found, expected)


def test_variants_that_differ_from_the_config() -> None:
    def names(cuda: bool, **changes: Any) -> list[str]:
        return [variant.name for variant in choose_variants(None, OffloadConfig(**changes), cuda)]

    assert names(True) == [name for name in VARIANTS if name != "prefetch-off"]
    assert "no-graph" not in names(False)
    assert "prefetch-off" in names(True, prefetch="exact") and "prefetch-exact" not in names(True, prefetch="exact")
    assert names(True, kv_location="gpu") == ["ours", "prefetch-exact", "prefetch-speculative", "no-graph"]
    assert [variant.name for variant in choose_variants("ours, paper,ours", OffloadConfig(), True)] == ["ours", "paper"]
    with pytest.raises(InputError, match="--kv-location host"):
        choose_variants("ours,paper", OffloadConfig(kv_location="gpu"), True)
    for wrong in ("ours,their", ","):
        with pytest.raises(InputError, match="use some of paper, ours"):
            choose_variants(wrong, OffloadConfig(), True)
