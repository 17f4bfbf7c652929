"""A prompt read once gives the answers that two generators give that read it each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ds_offload import InputError, OffloadedGenerator
from ds_offload.errors import MemoryPlanError
from ds_offload.evaluation import read_once
from ds_offload.evaluation.read_once import ReadOnce
from ds_offload.evaluation.subject import EvalSubject, dense_twin

MakeSubject = Callable[..., EvalSubject]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def prompt(tokens: int = 200) -> list[int]:
    return [(7 * n * n + 3) % 250 for n in range(tokens)]


def count_prefills(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    real, calls = read_once.prefill, []

    def counting(*given: Any, **named: Any) -> Any:
        calls.append(len(given[3]))
        return real(*given, **named)

    monkeypatch.setattr(read_once, "prefill", counting)
    return calls


def check_answers(subject: EvalSubject, tokens: int) -> None:
    """Both answers of two prompts against each generator's own, which reads the prompt for itself."""
    # Of the same size as theirs: the hot set's is the longest context's.
    with ReadOnce(subject, tokens, tokens + 24) as prompts:
        for each in (prompt(tokens - 20), prompt(tokens)):
            outputs = prompts.answer(each, 24 if len(each) == tokens else 3)
    configs = dense_twin(subject.config), subject.config
    for out, config in zip(outputs, configs, strict=True):
        # Greedy, so equal logits give equal tokens; the two share a model and its calibration.
        alone = OffloadedGenerator(subject.sparse.loaded, config).generate(prompt(tokens), max_new_tokens=24)
        assert (out.token_ids, out.text, out.finish_reason) == (alone.token_ids, alone.text, alone.finish_reason)
        for name in ("mean_density", "h2d_bytes_per_token", "kept_tokens", "hot_set_hit_rate"):
            assert out.stats[name] == alone.stats[name], name
    assert outputs[0].stats["mean_density"] == 1 > outputs[1].stats["mean_density"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("fields", "prefills"),
    [
        ({}, 1),
        ({"dense_layers": (1,)}, 1),
        ({"kv_location": "gpu"}, 1),
        ({"prefetch": "exact", "segment_tokens": 64}, 1),
        # Quantised rows have their window apart, so they are read for each.
        ({"kv_dtype": "int8"}, 2),
    ],
    ids=str,
)
def test_the_answers_are_those_of_two_generators(
    subject_of: MakeSubject, monkeypatch: pytest.MonkeyPatch, device: str, fields: dict[str, Any], prefills: int
) -> None:
    calls = count_prefills(monkeypatch)
    subject = subject_of(device, **fields)
    check_answers(subject, 201)
    assert calls == [181] * prefills + [201] * prefills


def test_the_prompt_is_read_again_where_the_two_do_not_fit_together(
    subject_of: MakeSubject, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    subject, real, asked = subject_of(), read_once.check_request, []

    def short_of_room(loaded: Any, config: Any, *given: Any) -> Any:
        asked.append(config)
        if len(asked) == 2:
            raise MemoryPlanError("no room beside the first context")
        return real(loaded, config, *given)

    monkeypatch.setattr(read_once, "check_request", short_of_room)
    calls = count_prefills(monkeypatch)
    check_answers(subject, 180)
    assert calls == [160, 160, 180, 180]
    assert capsys.readouterr().err.count("every prompt is read twice") == 1


def test_rows_in_files_are_those_of_the_dense_answers_prompt(subject_of: MakeSubject, tmp_path: Path) -> None:
    subject = subject_of(kv_dir=str(tmp_path))
    assert dense_twin(subject.config).kv_dir is None
    check_answers(subject, 201)


def test_an_answer_ends_with_the_context(subject_of: MakeSubject) -> None:
    subject = subject_of()
    with ReadOnce(subject, 250, 256) as prompts:
        dense, sparse = prompts.answer(prompt(250), 24)
        assert len(dense.token_ids) == len(sparse.token_ids) == 6
        with pytest.raises(InputError, match="leaves no room for an answer"):
            prompts.answer(prompt(256), 24)
