"""Hand-overs between streams: a slow producer changes nothing, and an event taken out is noticed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import random_prompts, save_tiny, tiny_config

from ds_offload import OffloadConfig, OffloadedGenerator
from ds_offload.errors import LoadError
from ds_offload.kv_context import KVContext
from ds_offload.prefetch.streams import Faults, Streams
from ds_offload.prefill import prefill
from ds_offload.stored_blocks import StoredBlocks

# About 35 ms at 1.7 GHz: longer than the host takes to issue the rest of a tiny model's step.
SLOW = 60_000_000
NEW = 5

PRODUCERS = ["hidden", "selection", "gather", "rows", "label", "host_write", "kv", "leaving", "prompt_rows"]

# Where each wait is what keeps the output right: (prefetch, kv_location, budget, hand-overs to take out, producer to
# delay). Steps run eagerly here: a captured graph refuses a fork without its event, and its replays are ordered anyway.
NEEDED = [
    ("speculative", "host", 24, {"hidden"}, "hidden"),
    ("speculative", "host", 24, {"selection", "gather"}, "selection"),
    ("speculative", "host", 24, {"selection", "gather"}, "gather"),
    ("off", "host", "1/1", {"rows"}, "rows"),
    ("off", "host", "1/1", {"step"}, "host_write"),
    ("off", "gpu", 24, {"step"}, "label"),
    ("off", "host", 24, {"step"}, "prompt_rows"),
    ("off", "host", 24, {"leaving"}, "kv"),
    ("off", "host", 24, {"prompt_rows"}, "prompt_rows"),
    ("off", "gpu", 24, {"prompt_rows"}, "prompt_rows"),
]


def logits(
    folder: Path,
    prefetch: str,
    location: str,
    faults: Faults | None = None,
    budget: int | str = 24,
    capture: bool = True,
    kv_dtype: str = "auto",
) -> torch.Tensor:
    # No recent window: the token of one step may be selected, from the host, in the next.
    changes: dict[str, Any] = {"prefetch": prefetch, "kv_location": location, "kv_dtype": kv_dtype}
    config = OffloadConfig(
        max_context=1024, token_budget=budget, sink_tokens=1, recent_tokens=0, hot_set=1, segment_tokens=64, **changes
    )
    with OffloadedGenerator.from_pretrained(str(folder), config=config, device="cuda") as gen:
        gen.faults = faults
        gen.decoder.capturable = capture
        outs = gen.generate(random_prompts(300, 41), max_new_tokens=NEW, output_logits=True)
    return torch.stack([out.logits for out in outs])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("streams")
    save_tiny(folder, tiny_config("llama", num_hidden_layers=4))
    return folder


@pytest.mark.gpu
@pytest.mark.parametrize("capture", [True, False])
@pytest.mark.parametrize("location", ["host", "gpu"])
@pytest.mark.parametrize("prefetch", ["exact", "speculative", "off"])
def test_a_slow_producer_changes_nothing(folder: Path, prefetch: str, location: str, capture: bool) -> None:
    expected = logits(folder, prefetch, location, capture=capture)
    for producer in PRODUCERS:
        slow = logits(folder, prefetch, location, Faults(delay={producer: SLOW}), capture=capture)
        assert torch.equal(slow, expected), producer


@pytest.mark.gpu
@pytest.mark.parametrize("capture", [True, False])
@pytest.mark.parametrize("kv_dtype", ["int8", "int4"])
def test_quantised_rows_wait_for_their_producers(folder: Path, kv_dtype: str, capture: bool) -> None:
    changes = {"capture": capture, "kv_dtype": kv_dtype}
    expected = logits(folder, "exact", "host", **changes)
    for location in ("host", "gpu"):
        for producer in PRODUCERS:
            slow = logits(folder, "exact", location, Faults(delay={producer: SLOW}), **changes)
            assert torch.equal(slow, expected), (location, producer)


@pytest.mark.gpu
@pytest.mark.parametrize(("prefetch", "location", "budget", "drop", "producer"), NEEDED)
def test_an_event_taken_out_is_noticed(
    folder: Path, prefetch: str, location: str, budget: int | str, drop: set[str], producer: str
) -> None:
    expected = logits(folder, prefetch, location, budget=budget, capture=False)
    faults = Faults(delay={producer: SLOW}, drop=frozenset(drop))
    try:
        broken = logits(folder, prefetch, location, faults, budget, capture=False)
    except LoadError as error:
        # What was never written may be no numbers.
        assert "not finite" in str(error)
        return
    assert not torch.equal(broken, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("drop", [frozenset(), frozenset({"kv"})])
@torch.no_grad()
def test_rows_are_read_back_behind_what_was_written_before_a_prefill(folder: Path, drop: frozenset[str]) -> None:
    """Only `kv` tells the prefetch stream of what the compute stream has joined, such as an answer's last rows."""
    with OffloadedGenerator.from_pretrained(str(folder), config=OffloadConfig(max_context=1024), device="cuda") as gen:
        (ids,) = random_prompts(300)
        faults = Faults(delay={"host_write": SLOW}, drop=drop)
        with KVContext(gen.decoder, gen.config, gen.calibrated(ids), [400], faults) as context:
            streams, tokens = context.streams, len(ids)
            prefill(gen.decoder, context, 0, ids)
            stored = StoredBlocks(gen.decoder, context, 0, tokens)
            rows = next(stored.layer(0, tokens, 0)).clone()
            torch.cuda.synchronize()
            with streams.on("writer"), streams.producing("host_write", 0):
                context.store.write_prompt(0, 0, 0, rows + 1)
            streams.join()
            with streams.producing("kv", 0):
                pass
            read = next(stored.layer(0, tokens, 0))
            assert torch.equal(read, rows + 1) != bool(drop)


@pytest.mark.gpu
@pytest.mark.parametrize("prefetch", ["exact", "speculative", "off"])
def test_a_captured_step_equals_an_eager_one(folder: Path, prefetch: str) -> None:
    assert torch.equal(logits(folder, prefetch, "host"), logits(folder, prefetch, "host", capture=False))


@pytest.mark.gpu
def test_exact_off_and_gpu_are_identical_on_cuda(folder: Path) -> None:
    expected = logits(folder, "exact", "host")
    for prefetch, location in (("off", "host"), ("exact", "gpu"), ("off", "gpu")):
        assert torch.equal(logits(folder, prefetch, location), expected), (prefetch, location)
    assert torch.equal(logits(folder, "speculative", "host"), logits(folder, "speculative", "gpu"))


def test_on_a_cpu_streams_run_in_order_and_hand_over_nothing() -> None:
    streams = Streams(torch.device("cpu"), Faults(delay={"rows": SLOW}))
    order = []
    with streams.producing("rows", 0):
        order.append("made")
    with streams.on("writer"):
        streams.wait("rows", 0)
        order.append("read")
    assert order == ["made", "read"]
