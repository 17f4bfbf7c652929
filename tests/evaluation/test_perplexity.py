"""Teacher-forced loss against transformers' own, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from ds_offload import InputError
from ds_offload.evaluation.perplexity import eval_perplexity, measure_windows
from ds_offload.evaluation.subject import EvalSubject, dense_twin, kept_tokens
from ds_offload.evaluation.teacher_forcing import teacher_force
from ds_offload.evaluation.windows import Window, cut_windows

POSITIONS = 24

MakeSubject = Callable[..., EvalSubject]


def transformers_losses(folder: Path, ids: list[int], positions: int) -> list[float]:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, -positions - 1 : -1].float()
    return F.cross_entropy(logits, torch.tensor(ids[-positions:]), reduction="none").tolist()


def test_a_budget_of_the_whole_context_gives_transformers_loss(
    tiny_folder: Path, subject_of: MakeSubject, text: str
) -> None:
    subject = subject_of()
    windows = cut_windows(subject, {"text": text}, POSITIONS, 2)
    assert [len(window.ids) for window in windows] == [256, 256]
    assert windows[0].ids + windows[1].ids == subject.encode(text)[:512]
    expected = [sum(transformers_losses(tiny_folder, window.ids, POSITIONS)) / POSITIONS for window in windows]
    result = eval_perplexity(subject, {"text": text}, POSITIONS, 2)
    assert [row["nll"] for row in result.dense["windows"]] == pytest.approx(expected, abs=1e-4)
    assert result.dense["nll"] == pytest.approx(sum(expected) / 2, abs=1e-4)
    assert result.delta == result.sparse["nll"] - result.dense["nll"]
    assert abs(result.delta) > 1e-3


def test_every_step_predicts_the_token_behind_it(tiny_folder: Path, subject_of: MakeSubject, text: str) -> None:
    subject = subject_of()
    window = cut_windows(subject, {"text": text}, POSITIONS, 1)[0]
    losses: list[float] = []

    def visit(number: int, logits: torch.Tensor) -> None:
        target = torch.tensor(window.ids[-POSITIONS + number])
        losses.append(F.cross_entropy(logits, target).item())

    teacher_force(subject, dense_twin(subject.config), window.ids[:-1], POSITIONS, visit)
    assert losses == pytest.approx(transformers_losses(tiny_folder, window.ids, POSITIONS), abs=1e-3)


@pytest.mark.parametrize("location", ["host", "gpu"])
@pytest.mark.parametrize("dense_layers", [(), (1,)])
def test_density_is_what_was_attended(
    location: str, dense_layers: tuple[int, ...], subject_of: MakeSubject, text: str
) -> None:
    subject = subject_of(kv_location=location, dense_layers=dense_layers)
    windows = cut_windows(subject, {"text": text}, POSITIONS, 1)
    _, density = measure_windows(subject, subject.config, windows, POSITIONS)
    lengths = range(256 - POSITIONS, 256)
    sparse = sum(kept_tokens(subject.config, length) for length in lengths) / sum(lengths)
    assert density == pytest.approx((len(dense_layers) + (3 - len(dense_layers)) * sparse) / 3)
    _, whole = measure_windows(subject, dense_twin(subject.config), windows, POSITIONS)
    assert whole == 1.0


def test_top_p_density_is_counted_not_assumed(subject_of: MakeSubject, text: str) -> None:
    subject = subject_of(token_budget="top-p:0.3")
    windows = cut_windows(subject, {"text": text}, POSITIONS, 1)
    _, density = measure_windows(subject, subject.config, windows, POSITIONS)
    allowed = kept_tokens(subject.config, 255) / 255
    assert 7 / 256 <= density < allowed


def test_modes_of_the_same_selection_have_the_same_loss(subject_of: MakeSubject, text: str) -> None:
    figures = {}
    for mode in ("off", "exact", "speculative"):
        subject = subject_of(prefetch=mode)
        windows = cut_windows(subject, {"text": text}, POSITIONS, 1)
        figures[mode] = measure_windows(subject, subject.config, windows, POSITIONS)[0]
    assert figures["off"]["nll"] == figures["exact"]["nll"]
    assert figures["off"]["nll"] != figures["speculative"]["nll"]
    assert figures["off"]["h2d_bytes_per_token"] > 0


def test_windows_keep_the_tokenizers_first_token(subject_of: MakeSubject, text: str) -> None:
    subject = subject_of()

    class WithBos:
        bos_token_id = 299

        def __call__(self, prompt: str, **options: Any) -> dict[str, list[int]]:
            return {"input_ids": [299, *prompt.encode()]}

    object.__setattr__(subject.prepared, "tokenizer", WithBos())
    windows = cut_windows(subject, {"text": text}, POSITIONS, None)
    body = list(text.encode())
    assert [window.ids for window in windows] == [[299, *body[:255]]]
    assert cut_windows(subject, {"text": text}, POSITIONS, 2) == [
        Window("text", 0, [299, *body[:255]]),
        Window("text", 1, [299, *body[255:510]]),
    ]


def test_refusals_name_what_is_needed(subject_of: MakeSubject, text: str) -> None:
    with pytest.raises(InputError, match=r"short has 10 tokens, and --ctx is 256"):
        eval_perplexity(subject_of(), {"short": "abcdefghij"}, POSITIONS)
    with pytest.raises(InputError, match=r"token_budget=1/1 .* keeps all of a context of 232 tokens"):
        eval_perplexity(subject_of(token_budget="1/1"), {"text": text}, POSITIONS)
    with pytest.raises(InputError, match=r"token_budget=240 "):
        eval_perplexity(subject_of(token_budget=240), {"text": text}, POSITIONS)
    with pytest.raises(InputError, match="positions=255"):
        eval_perplexity(subject_of(), {"text": text}, 255)
    with pytest.raises(ValueError, match="3 steps of 3 tokens"):
        teacher_force(subject_of(), subject_of().config, [1, 2, 3], 3, lambda number, logits: None)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["off", "exact", "speculative"])
def test_on_cuda_the_loss_is_the_cpus(mode: str, subject_of: MakeSubject, text: str) -> None:
    results = {}
    for device in ("cpu", "cuda"):
        results[device] = eval_perplexity(subject_of(device, prefetch=mode), {"text": text}, POSITIONS, 2)
    assert results["cuda"].dense["nll"] == pytest.approx(results["cpu"].dense["nll"], rel=1e-3)
    assert results["cuda"].sparse["nll"] == pytest.approx(results["cpu"].sparse["nll"], rel=0.02)
    assert results["cuda"].density == pytest.approx(results["cpu"].density, rel=1e-6)
