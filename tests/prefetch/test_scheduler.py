"""The scheduler: what is predicted, what is fetched ahead, and what counts as attended."""

from __future__ import annotations

import pytest
import torch

from ds_offload.kernels.label_codec import LabelLayout
from ds_offload.memory.hot_set import HotSet
from ds_offload.memory.kv_store import KVStore
from ds_offload.memory.label_cache import LabelCache
from ds_offload.memory.label_code import ScalarLabels
from ds_offload.memory.pinned_pool import PinnedPool
from ds_offload.memory.window import AttentionWindow
from ds_offload.prefetch.scheduler import PrefetchMode, PrefetchScheduler
from ds_offload.prefetch.selection import Selector, Step
from ds_offload.prefetch.streams import Streams

CPU = torch.device("cpu")
HEADS, DIM, LENGTH, KEPT = 2, 8, 60, 8
WINDOW = AttentionWindow(2, 3)


def make(
    mode: PrefetchMode, capacity: int = 4 * KEPT, reuse: bool = True, everything: bool = False
) -> PrefetchScheduler:
    """The scheduler of three layers, the last of them dense, and a context of LENGTH tokens."""
    generator = torch.Generator().manual_seed(0)
    channels = torch.arange(DIM).expand(3, HEADS, DIM)
    code = ScalarLabels(LabelLayout(DIM, 16), channels, torch.zeros(3, HEADS, DIM), CPU)
    labels = LabelCache(code, [LENGTH], CPU)
    sizes = {"kv_heads": HEADS, "head_dim": DIM, "device": CPU}
    store = KVStore(
        layers=[0, 1], sequences=1, dtype=torch.float32, pool=PinnedPool(CPU), segment_tokens=16, max_tokens=LENGTH,
        **sizes,
    )  # fmt: skip
    store.reserve(0, LENGTH)
    for layer in range(2):
        rows = torch.randn(HEADS, LENGTH, 2, DIM, generator=generator)
        store.write_prompt(layer, 0, 0, rows)
        labels.write_prompt(layer, 0, 0, rows[:, :, 0])
    hot_set = HotSet(
        store, layers=[0, 1], sequences=1, window=WINDOW, capacity=capacity, context=LENGTH, reuse=reuse,
        admissions=2 if mode == "exact" else 1, **sizes,
    )  # fmt: skip
    selector = Selector(labels, WINDOW, 0.3, everything=everything)
    return PrefetchScheduler(
        mode, selector=selector, store=store, hot_set=hot_set, window=WINDOW, window_buffer=hot_set.window,
        streams=Streams(CPU), layers=3, sequences=1, kv_heads=HEADS, device=CPU,
    )  # fmt: skip


def begin(scheduler: PrefetchScheduler, kept: int = KEPT) -> None:
    scheduler.begin(Step.make([LENGTH], [kept], WINDOW, CPU))


def query(seed: int) -> torch.Tensor:
    return torch.randn(1, 2 * HEADS, DIM, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("mode", "capacity", "reuse", "ahead"),
    [
        ("off", 4 * KEPT, True, 0),
        ("exact", 4 * KEPT, True, KEPT // 4),
        ("exact", KEPT + 1, True, 1),
        ("exact", KEPT, True, 0),
        ("exact", 4 * KEPT, False, 0),
    ],
)
def test_the_look_ahead_fetches_what_ranked_next_and_has_room_for(
    mode: PrefetchMode, capacity: int, reuse: bool, ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    look_ahead = Selector.look_ahead
    monkeypatch.setattr(Selector, "look_ahead", lambda *given: asked.append(given[-1]) or look_ahead(*given))
    scheduler = make(mode, capacity, reuse)
    for _ in range(2):
        begin(scheduler)
        scheduler.keep(0, query(1))
    assert asked == ([KEPT + ahead] * 2 if ahead else [])
    traffic, untouched, _ = scheduler.traffic()
    steps = 1 if reuse else 2
    assert traffic.moved == steps * HEADS * (KEPT + ahead) and untouched.moved == 0
    # What was fetched ahead is not attended to.
    assert traffic.selected == 2 * HEADS * KEPT
    assert traffic.hit_rate == (0.5 if reuse else 0)
    assert traffic.recall == (0.5 if reuse else None)
    scheduler.clear_traffic()
    assert scheduler.traffic()[0].moved == 0


def test_layers_of_the_store_are_predicted_where_something_is_left_out() -> None:
    scheduler = make("speculative")
    begin(scheduler)
    assert [scheduler.wants_prediction(layer) for layer in range(3)] == [True, True, False]
    begin(scheduler, kept=0)
    assert not scheduler.wants_prediction(1)
    for other in (make("exact"), make("off"), make("speculative", everything=True)):
        begin(other)
        assert not other.wants_prediction(1)


def test_a_prediction_selects_and_one_of_an_interrupted_step_does_not() -> None:
    scheduler = make("speculative")
    predicted, own = query(2), query(3)
    hidden = torch.zeros(1, 4)
    begin(scheduler)
    scheduler.start(1, hidden, lambda given: predicted)
    kept = scheduler.keep(1, own)
    assert kept.selected_by is predicted and kept.arriving is None
    begin(scheduler)
    scheduler.start(1, hidden, lambda given: predicted)
    # The step is interrupted here.
    begin(scheduler)
    assert scheduler.keep(1, own).selected_by is own
