from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from chat_tokenizer import chat_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from ds_offload.evaluation.haystack import shipped_filler
from long_context.adapted_llama import AdaptedLlama, AdapterShape
from long_context.adapter_files import STATE, WEIGHTS
from long_context.answer_counts import Counts, count_answers, counts_line
from long_context.loss_curve import draw_curve, read_log
from long_context.trainer import LOG, Plan, Trainer
from long_context.training_data import TrainingData
from long_context.training_sequences import ANSWER, FACT, TASKS, TEXT, SequenceMaker

SHAPE = AdapterShape(attention_rank=8, mlp_rank=4, rope_theta=5e5, max_positions=2048)
LENGTH = 512


@pytest.fixture(scope="module")
def data() -> TrainingData:
    tokenizer = chat_tokenizer()
    maker = SequenceMaker({"text": shipped_filler()}, tokenizer)
    return TrainingData.make(maker, tokenizer.convert_tokens_to_ids("1"), {LENGTH: 10 * LENGTH}, "seed")


def trainer(data: TrainingData, folder: Path, **plan) -> Trainer:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "head_dim": 8,
        "vocab_size": 258,
        "initializer_range": 0.2,
    }
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    model = AdaptedLlama.from_model(LlamaForCausalLM(LlamaConfig(**sizes, **heads)), SHAPE, torch.float32)
    return Trainer(model, data, Plan(**{"steps": 8, "step_tokens": 1024, "rate": 1e-2, **plan}), folder, "base")


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / LOG).read_text().splitlines()]


def test_the_loss_falls(data: TrainingData, tmp_path: Path) -> None:
    made = trainer(data, tmp_path, steps=40, warmup=1)
    made.run(600, report_every=0)
    losses = [row["answers"] for row in rows(tmp_path) if row["answers"] is not None]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.3
    assert rows(tmp_path)[-1]["done"] == 1


def test_a_resumed_run_makes_the_steps_that_one_run_makes(data: TrainingData, tmp_path: Path) -> None:
    whole = trainer(data, tmp_path / "whole")
    whole.run(600)
    first = trainer(data, tmp_path / "parts")
    for _ in range(4):
        first.step()
    first.save()
    second = trainer(data, tmp_path / "parts")
    second.resume()
    assert second.progress == first.progress
    second.run(600)
    assert second.progress["step"] == 8
    assert second.progress["used"] == whole.progress["used"]
    for name, weight in whole.model.parameters().items():
        # The state is in 16 bits.
        torch.testing.assert_close(second.model.parameters()[name], weight, rtol=0.02, atol=2e-3, msg=name)
        assert weight.isfinite().all()


def test_a_signal_ends_the_run_with_its_state_saved(data: TrainingData, tmp_path: Path) -> None:
    made = trainer(data, tmp_path, steps=10_000)
    step = made.step

    def interrupted() -> None:
        step()
        if made.progress["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    made.step = interrupted  # type: ignore[method-assign]
    before = signal.getsignal(signal.SIGTERM)
    made.run(600)
    assert signal.getsignal(signal.SIGTERM) is before
    assert made.progress["step"] == 3
    assert (tmp_path / STATE).is_file() and (tmp_path / WEIGHTS).is_file()
    again = trainer(data, tmp_path)
    again.resume()
    assert again.progress["step"] == 3


def test_a_loss_that_is_no_number_ends_the_run_and_keeps_the_last_state(data: TrainingData, tmp_path: Path) -> None:
    made = trainer(data, tmp_path)
    made.step()
    made.save()
    kept = (tmp_path / STATE).read_bytes()
    with torch.no_grad():
        made.model.norms["norm"].fill_(float("nan"))
    with pytest.raises(SystemExit, match="not a number at step"):
        made.run(600, report_every=0)
    assert (tmp_path / STATE).read_bytes() == kept


def test_without_a_state_nothing_is_resumed(data: TrainingData, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--resume"):
        trainer(data, tmp_path).resume()


def test_gaps_leave_positions_in_order_and_within_what_is_trained(data: TrainingData, tmp_path: Path) -> None:
    made = trainer(data, tmp_path, skipped=1.0)
    chance = np.random.default_rng(0)
    facts, text = np.full(LENGTH, FACT), np.full(LENGTH, TEXT)
    longest = 0
    for _ in range(50):
        positions = made._positions(facts, chance)
        steps = np.diff(positions)
        assert positions[0] == 0 and (steps >= 1).all() and (steps > 1).sum() <= 2
        longest = max(longest, positions[-1])
    assert 1600 < longest < 2048
    assert (made._positions(text, chance) == np.arange(LENGTH)).all()


def test_answers_and_text_have_their_weights_each(data: TrainingData, tmp_path: Path) -> None:
    made = trainer(data, tmp_path, text_tokens=10, text_weight=0.25)
    kinds = np.array([[ANSWER] * 3 + [FACT] * 4 + [ANSWER + 1] * 2, [TEXT] * 9, [TEXT] * 9], np.uint8)
    places, weights = made._predicted(kinds, np.random.default_rng(0))
    assert (np.diff(places) > 0).all()
    of = kinds.flatten()[places]
    # Nothing predicts a sequence's first token.
    assert places[of >= ANSWER].tolist() == [1, 2, 7, 8]
    assert (of == TEXT).sum() == 10 and not {9, 18} & set(places)
    assert weights[of >= ANSWER].sum() == pytest.approx(1)
    assert weights[of == TEXT].sum() == pytest.approx(0.25)


def test_answers_count_whole() -> None:
    first, second = ANSWER + TASKS.index("needles"), ANSWER + TASKS.index("key-value")
    places = np.array([3, 4, 5, 9, 10, 11, 12, 20])
    kinds = np.array([first, first, first, first, first, second, TEXT, second], np.uint8)
    right = np.array([1, 1, 1, 1, 0, 1, 0, 0], bool)
    counts: Counts = {}
    count_answers(counts, 1024, places, kinds, right)
    count_answers(counts, 2048, places[:3], kinds[:3], right[:3])
    assert counts == {"1024": {"needles": [1, 2], "key-value": [1, 2]}, "2048": {"needles": [1, 1]}}
    assert counts_line(counts) == "1k: key-value 1/2, needles 1/2; 2k: needles 1/1"


def test_the_log_becomes_a_picture(data: TrainingData, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    made = trainer(data, tmp_path, steps=4)
    made.run(600, report_every=0)
    # Steps after the last state are made again after a crash.
    made.progress["step"] = 1
    made.step()
    made._report(1.0)
    found = read_log(tmp_path / LOG)
    assert [row["step"] for row in found] == [1, 2]
    draw_curve(found, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
