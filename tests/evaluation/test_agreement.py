"""The probe of attention against an offline computation, and agreement of a budget with itself."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from ds_offload import OffloadConfig
from ds_offload.attention_fidelity import FidelitySums, compare_step
from ds_offload.evaluation.agreement import eval_agreement
from ds_offload.evaluation.subject import EvalSubject, dense_twin
from ds_offload.evaluation.teacher_forcing import teacher_force

STEPS = 5
MakeSubject = Callable[..., EvalSubject]


def first_layer_by_hand(subject: EvalSubject, ids: list[int]) -> tuple[float, float]:
    """Mass and error of layer 0 where only sinks and the window are attended: its inputs do not depend on the rest."""
    decoder = subject.sparse.decoder
    groups = decoder.heads // decoder.kv_heads
    with torch.no_grad():
        rope = decoder.rotary(torch.arange(len(ids)))
        query, key, value = decoder.project_qkv(0, decoder.embed(torch.tensor(ids)), rope)
    masses, errors = [], []
    for position in range(len(ids) - STEPS, len(ids)):
        tokens = torch.arange(position + 1)
        attended = (tokens < subject.config.sink_tokens) | (tokens >= position - subject.config.recent_tokens)
        for head in range(decoder.heads):
            scores = decoder.scaling * key[: position + 1, head // groups] @ query[position, head]
            weights, values = scores.softmax(0), value[: position + 1, head // groups]
            exact = weights @ values
            sparse = scores.masked_fill(~attended, -torch.inf).softmax(0) @ values
            masses.append(weights[attended].sum().item())
            errors.append(((sparse - exact).norm() / exact.norm()).item())
    return sum(masses) / len(masses), sum(errors) / len(errors)


def compared(subject: EvalSubject, ids: list[int], config: OffloadConfig | None = None) -> FidelitySums:
    sums = FidelitySums(subject.sparse.decoder.layers)
    watch = partial(watch_into, subject, sums)
    teacher_force(subject, config or subject.config, ids, STEPS, lambda number, logits: None, watch=watch)
    return sums


def watch_into(subject: EvalSubject, sums: FidelitySums, *step: Any) -> None:
    compare_step(subject.sparse.decoder, *step, sums)


@pytest.mark.parametrize("location", ["host", "gpu"])
@pytest.mark.parametrize("segment", [64, 1024])
def test_mass_and_error_equal_an_offline_computation(
    location: str, segment: int, subject_of: MakeSubject, text: str
) -> None:
    subject = subject_of(token_budget=1, kv_location=location, segment_tokens=segment)
    ids = subject.encode(text)[:200]
    sums = compared(subject, ids)
    mass, error = first_layer_by_hand(subject, ids)
    assert sums.comparisons == STEPS * 3
    layers = sums.figures()["layers"]
    assert layers["attention_mass"][0] == pytest.approx(mass, rel=1e-5)
    assert layers["output_error"][0] == pytest.approx(error, rel=1e-5)
    assert layers["best_mass"][0] == layers["attention_mass"][0], "nothing is selected"
    assert layers["selection_recall"] == [None] * 3


def test_all_ways_to_the_same_selection_capture_the_same(subject_of: MakeSubject, text: str) -> None:
    figures = {}
    for location, mode in (("host", "off"), ("host", "exact"), ("gpu", "off")):
        subject = subject_of(kv_location=location, prefetch=mode)
        figures[location, mode] = compared(subject, subject.encode(text)[:200]).figures()
    first = figures["host", "off"]
    assert 0 < first["attention_mass"] < 1
    for other in figures.values():
        assert other["layers"]["attention_mass"] == pytest.approx(first["layers"]["attention_mass"], rel=1e-5)
        assert other["layers"]["output_error"] == pytest.approx(first["layers"]["output_error"], rel=1e-5)


@pytest.mark.parametrize("kv_dtype", ["int8", "int4"])
def test_quantised_rows_are_compared_with_themselves(subject_of: MakeSubject, text: str, kv_dtype: str) -> None:
    """Host and device capture the same, little else than without; attending to everything captures it all.

    What is left then is the window, which is attended to as it is and compared with its quantised rows.
    """
    figures = {}
    for name, changes in {
        "plain": {},
        "host": {"kv_dtype": kv_dtype},
        "gpu": {"kv_dtype": kv_dtype, "kv_location": "gpu"},
        "everything": {"kv_dtype": kv_dtype, "token_budget": "1/1"},
    }.items():
        subject = subject_of(**changes)
        figures[name] = compared(subject, subject.encode(text)[:200]).figures()
    for name in ("attention_mass", "output_error"):
        assert figures["host"][name] == pytest.approx(figures["gpu"][name], rel=1e-5)
    assert figures["host"]["attention_mass"] == pytest.approx(figures["plain"]["attention_mass"], rel=0.05)
    assert figures["everything"]["attention_mass"] == pytest.approx(1, abs=1e-5)
    assert 0 < figures["everything"]["output_error"] < {"int8": 1e-3, "int4": 2e-2}[kv_dtype]


def test_a_predicted_selection_is_what_speculative_captures(subject_of: MakeSubject, text: str) -> None:
    off, speculative = subject_of(), subject_of(prefetch="speculative")
    ids = off.encode(text)[:200]
    one, other = (compared(subject, ids).figures()["layers"]["attention_mass"] for subject in (off, speculative))
    # The first layer is never predicted.
    assert one[0] == pytest.approx(other[0], rel=1e-6)
    assert one[1:] != other[1:]


def test_attending_to_everything_captures_everything(subject_of: MakeSubject, text: str) -> None:
    subject = subject_of(dense_layers=(1,))
    figures = compared(subject, subject.encode(text)[:100], dense_twin(subject.config)).figures()
    assert figures["layers"]["attention_mass"] == [pytest.approx(1, abs=1e-5), None, pytest.approx(1, abs=1e-5)]
    assert figures["attention_mass"] == pytest.approx(1, abs=1e-5)
    assert figures["output_error"] == pytest.approx(0, abs=1e-4)


def test_watching_changes_no_logit(subject_of: MakeSubject, text: str) -> None:
    subject = subject_of(prefetch="exact")
    ids = subject.encode(text)[:150]
    sums = FidelitySums(3)
    runs: list[list[torch.Tensor]] = []
    for watch in (None, partial(watch_into, subject, sums)):
        rows: list[torch.Tensor] = []
        visit = lambda number, logits, rows=rows: rows.append(logits.clone())  # noqa: E731
        teacher_force(subject, subject.config, ids, STEPS, visit, watch=watch)
        runs.append(rows)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_agreement_of_dense_and_sparse(subject_of: MakeSubject, text: str) -> None:
    result = eval_agreement(subject_of(), {"text": text}, 8, 1)
    assert 0 <= result.sparse["top1_match"] <= 1
    assert result.sparse["kl"] > 1e-6
    assert 0 < result.sparse["attention_mass"] < 1
    assert result.dense.keys() == {"nll"}
    # A budget that leaves out almost nothing agrees almost wholly.
    close = eval_agreement(subject_of(token_budget="99/100"), {"text": text}, 8, 1)
    assert close.sparse["kl"] < result.sparse["kl"] / 4
    assert close.sparse["attention_mass"] > 0.95


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["off", "exact", "speculative"])
@pytest.mark.parametrize("location", ["host", "gpu"])
def test_on_cuda_a_captured_step_is_measured_like_the_cpus(
    mode: str, location: str, subject_of: MakeSubject, text: str
) -> None:
    figures = {}
    for device in ("cpu", "cuda"):
        subject = subject_of(device, prefetch=mode, kv_location=location)
        figures[device] = compared(subject, subject.encode(text)[:200]).figures()
    assert figures["cuda"]["layers"]["attention_mass"] == pytest.approx(
        figures["cpu"]["layers"]["attention_mass"], abs=0.02
    )
    assert figures["cuda"]["layers"]["output_error"][0] == pytest.approx(
        figures["cpu"]["layers"]["output_error"][0], rel=0.02
    )
