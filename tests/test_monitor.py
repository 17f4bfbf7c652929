"""The run-time monitor: its figures, what it costs, what it warns of, and that it changes nothing else."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import random_prompts, save_tiny, tiny_config

from ds_offload import InputError, OffloadConfig, OffloadedGenerator
from ds_offload import monitor as monitor_module
from ds_offload.attention_fidelity import AttentionFidelity
from ds_offload.kernels.product_code import ProductCode
from ds_offload.monitor import FidelityMonitor, MonitorPace

NEW = 12
COMMON = {"max_context": 1024, "sink_tokens": 2, "recent_tokens": 4, "token_budget": "1/8", "segment_tokens": 64}


def make(folder: Path, device: str = "cpu", **changes: Any) -> OffloadedGenerator:
    config = OffloadConfig(**(COMMON | {"monitor_every": 1} | changes))
    return OffloadedGenerator.from_pretrained(str(folder), config=config, device=device)


@pytest.fixture(scope="module")
def concentrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose attention goes by two channels of each key, and to few tokens."""
    folder = tmp_path_factory.mktemp("concentrated")
    model = save_tiny(folder, tiny_config("llama"))
    dim = model.config.hidden_size // model.config.num_attention_heads
    # The slowest pair of RoPE: what it says hardly depends on the position.
    scale = torch.full((dim,), 0.1)
    scale[[dim // 2 - 1, dim - 1]] = 4.0
    with torch.no_grad():
        for layer in model.model.layers:
            for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                linear.weight.mul_(scale.repeat(linear.weight.shape[0] // dim)[:, None])
    model.save_pretrained(folder)
    return folder


def with_wrong_channels(generator: OffloadedGenerator) -> OffloadedGenerator:
    """Labels that keep the least important channels."""
    generator.generate(random_prompts(50)[0], max_new_tokens=1)
    calibration = generator._calibration
    assert calibration is not None
    generator._calibration = dataclasses.replace(calibration, channels=calibration.channels.flip(-1))
    return generator


def with_foreign_words(generator: OffloadedGenerator) -> OffloadedGenerator:
    """Product codes whose words belong to other parts of other layers: labels of keys that nobody has."""
    generator.generate(random_prompts(50)[0], max_new_tokens=1)
    calibration = generator._calibration
    assert calibration is not None and calibration.codes is not None
    codes = calibration.codes
    foreign = codes.words.flip(0, 2, 4).roll(5, 3).contiguous()
    codes = ProductCode(codes.mean, codes.basis.flip(-1).contiguous(), codes.turn, foreign)
    generator._calibration = dataclasses.replace(calibration, codes=codes)
    return generator


def by_hand(generator: OffloadedGenerator, ids: list[int]) -> dict[str, float]:
    """Figures of layer 0 for the last of `ids`, where the best tokens are selected."""
    decoder, config = generator.decoder, generator.config
    groups, position = decoder.heads // decoder.kv_heads, len(ids) - 1
    with torch.no_grad():
        rope = decoder.rotary(torch.arange(len(ids)))
        query, key, value = decoder.project_qkv(0, decoder.embed(torch.tensor(ids)), rope)
    tokens = torch.arange(len(ids))
    window = (tokens < config.sink_tokens) | (tokens >= position - config.recent_tokens)
    masses, windows, errors = [], [], []
    for kv_head in range(decoder.kv_heads):
        heads = range(kv_head * groups, (kv_head + 1) * groups)
        scores = torch.stack([decoder.scaling * key[:, kv_head] @ query[position, head] for head in heads])
        weights = scores.softmax(-1)
        count = config.budget.tokens(len(ids)) - int(window.sum())
        best = weights.sum(0).masked_fill(window, -1).topk(count).indices
        attended = window.clone()
        attended[best] = True
        exact = weights @ value[:, kv_head]
        sparse = scores.masked_fill(~attended, -torch.inf).softmax(-1) @ value[:, kv_head]
        masses += weights[:, attended].sum(-1).tolist()
        windows += weights[:, window].sum(-1).tolist()
        errors += ((sparse - exact).norm(dim=-1) / exact.norm(dim=-1)).tolist()
    mean = {name: sum(each) / len(each) for name, each in (("mass", masses), ("window", windows), ("error", errors))}
    return {
        "attention_mass": mean["mass"],
        "best_mass": mean["mass"],
        "window_mass": mean["window"],
        "output_error": mean["error"],
        "selection_recall": 1.0,
    }


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("location", ["host", "gpu"])
def test_figures_equal_an_offline_computation(kv_heads: int, location: str, tmp_path: Path) -> None:
    """Labels of all channels select the exact top-k; layer 0 is the only one compared."""
    save_tiny(tmp_path, tiny_config("llama", kv_heads))
    prompt = random_prompts(200)[0]
    labels = {"label_bits": 16, "label_channels": 16}
    with make(tmp_path, kv_location=location, dense_layers=(1, 2), **labels) as gen:
        out = gen.generate(prompt, max_new_tokens=2)
        expected = by_hand(gen, [*prompt, out.token_ids[0]])
    seen = out.stats["monitor"]
    assert seen["comparisons"] == 1
    for name, value in expected.items():
        assert seen[name] == pytest.approx(value, abs=1e-5)
        assert seen["layers"][name] == [seen[name], None, None]


@pytest.mark.parametrize("changes", [{}, {"prefetch": "exact"}, {"prefetch": "speculative"}, {"kv_location": "gpu"}])
def test_watching_changes_no_logit(changes: dict[str, Any], concentrated: Path) -> None:
    prompts = random_prompts(150, 61)
    logits = []
    for monitor in ("off", "warn"):
        with make(concentrated, monitor=monitor, **changes) as gen:
            outs = gen.generate(prompts, max_new_tokens=NEW, output_logits=True)
        logits.append(torch.stack([out.logits for out in outs]))
        assert (outs[0].stats["monitor"] is None) == (monitor == "off")
    assert torch.equal(*logits)


def test_labels_of_the_wrong_channels_are_warned_about(concentrated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = random_prompts(300)[0]
    labels = {"label_bits": 8, "label_channels": 2}
    with make(concentrated, **labels) as gen:
        good = gen.generate(prompt, max_new_tokens=NEW).stats["monitor"]
        assert good["warning"] is None and "captures" not in capsys.readouterr().err
        bad = with_wrong_channels(gen).generate(prompt, max_new_tokens=NEW).stats["monitor"]
        assert bad["warning"] in capsys.readouterr().err
    for part in ("the labels miss it", "--label-bits 16 --label-channels 2", "--calibration", "--token-budget 1/4"):
        assert part in bad["warning"]
    assert "\n" not in bad["warning"]
    assert good["selection_recall"] > 0.8 > 0.4 > bad["selection_recall"]


def test_product_codes_of_foreign_words_are_warned_about(
    concentrated: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = random_prompts(300)[0]
    with make(concentrated) as gen:
        good = gen.generate(prompt, max_new_tokens=NEW).stats["monitor"]
        assert good["warning"] is None and "captures" not in capsys.readouterr().err
        bad = with_foreign_words(gen).generate(prompt, max_new_tokens=NEW).stats["monitor"]
        assert bad["warning"] in capsys.readouterr().err
    for part in ("the labels miss it", "--calibration", "--token-budget 1/4"):
        assert part in bad["warning"]
    assert "--label-bits" not in bad["warning"] and "\n" not in bad["warning"]
    assert good["selection_recall"] > 0.7 > 0.4 > bad["selection_recall"]


def test_a_budget_too_small_for_wide_attention_is_warned_about(tmp_path: Path) -> None:
    # Keys and queries near zero: every token has the same weight, and no selection captures much.
    save_tiny(tmp_path, tiny_config("llama", initializer_range=0.001))
    with make(tmp_path, label_bits=16, label_channels=16) as gen:
        seen = gen.generate(random_prompts(300)[0], max_new_tokens=NEW).stats["monitor"]
    assert seen["attention_mass"] == pytest.approx(1 / 8, abs=0.01)
    assert seen["warning"].endswith("set --token-budget 1/4")


def test_widening_raises_the_budget_as_far_as_it_was_planned_for(concentrated: Path) -> None:
    prompt = random_prompts(300)[0]
    changes = {"label_bits": 8, "label_channels": 2, "monitor": "widen"}
    with make(concentrated, **changes) as gen:
        good = gen.generate(prompt, max_new_tokens=NEW)
        bad = with_wrong_channels(gen).generate(prompt, max_new_tokens=NEW)
    assert good.stats["monitor"]["token_budget"] == "1/8"
    assert bad.stats["monitor"]["token_budget"] == "1/4"
    # Comparisons 2 and 4 widen by a half each; the steps behind them attend to more.
    steps = [1 / 8] * 2 + [3 / 16] * 2 + [1 / 4] * (NEW - 5)
    assert bad.stats["mean_density"] == pytest.approx(sum(steps) / len(steps), abs=0.004)
    assert good.stats["mean_density"] == pytest.approx(1 / 8, abs=0.004)
    with make(concentrated, label_bits=8, label_channels=2) as gen:
        assert gen.generate(prompt, max_new_tokens=NEW).token_ids == good.token_ids


@pytest.mark.parametrize(
    "changes",
    [{"monitor": "off"}, {"token_budget": "1/1"}, {"dense_layers": (0, 1, 2)}, {"monitor_every": None}],
)
def test_stats_are_null_where_nothing_was_compared(changes: dict[str, Any], concentrated: Path) -> None:
    with make(concentrated, **changes) as gen:
        # The first comparison comes behind the eighth step, which follows the ninth token.
        stats = gen.generate(random_prompts(100)[0], max_new_tokens=MonitorPace.FIRST_STEP).stats
    assert stats["monitor"] is None


def test_short_answers_have_figures_by_default(concentrated: Path) -> None:
    with make(concentrated, monitor_every=None) as gen:
        stats = gen.generate(random_prompts(100)[0], max_new_tokens=MonitorPace.FIRST_STEP + 1).stats
    assert stats["monitor"]["comparisons"] == MonitorPace.FIRST
    assert stats["monitor"]["seconds"] > 0


@pytest.mark.parametrize("comparison_s", [0.0001, 0.04, 3.0])
def test_comparisons_take_a_hundredth_of_the_time(comparison_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 15 ms on a clock of our own; the first comparisons are exempt."""
    clock, made = [0.0], []

    def compare(decoder: Any, context: Any, step: Any, layer: int, *rest: Any) -> AttentionFidelity:
        clock[0] += comparison_s
        made.append(layer)
        return AttentionFidelity(0.9, 0.9, 0.5, 0.1, 1.0)

    monkeypatch.setattr(monitor_module, "compare_attention", compare)
    decoder: Any = SimpleNamespace(layers=32)
    loop: Any = SimpleNamespace(last=object())
    watched = FidelityMonitor(decoder, OffloadConfig(), lambda: clock[0])
    steps = 60_000
    for number in range(1, steps + 1):
        clock[0] += 0.015
        watched.stepped(SimpleNamespace(), loop, [100], [0])  # type: ignore[arg-type]
        if number == MonitorPace.FIRST_STEP - 1:
            assert not made
        if number == MonitorPace.FIRST_STEP:
            assert len(made) == MonitorPace.FIRST
    decode_s = 0.015 * steps
    later = watched.seconds - MonitorPace.FIRST * comparison_s
    assert later <= 0.01 * decode_s
    # As often as that allows, but never more than once a step.
    assert later > min(0.009 * decode_s - comparison_s, 0.6 * steps * comparison_s)
    if comparison_s < 1:
        assert set(made) == set(range(32))
        # A few stand for all: the first four are far from each other.
        assert min(abs(a - b) for a in made[:4] for b in made[:4] if a != b) >= 4


def test_a_number_of_steps_is_kept_to() -> None:
    pace = MonitorPace(5)
    due = []
    for step in range(1, 21):
        due.append(pace.due(step, 0.001 * step))
        if due[-1]:
            pace.took(100.0, 0.001 * step)
    assert [step for step, count in enumerate(due, 1) if count] == [5, 10, 15, 20]


@pytest.mark.parametrize("budget", ["1/8", "top-p:0.5"])
def test_kept_tokens_are_counted(budget: str, concentrated: Path) -> None:
    with make(concentrated, token_budget=budget, dense_layers=(1,)) as gen:
        stats = gen.generate(random_prompts(300)[0], max_new_tokens=NEW).stats
    first, dense, last = stats["layers"]["kept_tokens"]
    assert dense is None and stats["kept_tokens"] == pytest.approx((first + last) / 2)
    # Steps see 301 to 311 tokens.
    if budget == "1/8":
        assert first == last == pytest.approx(306 / 8, abs=1)
    else:
        assert 7 <= first < 60 and 7 <= last < 60, "fewer than the cap of 1/4"


def test_a_top_p_budget_is_not_widened() -> None:
    with pytest.raises(InputError, match=r"monitor='widen'.*top-p:0.9.*monitor='warn'"):
        OffloadConfig(token_budget="top-p:0.9", monitor="widen")


@pytest.mark.gpu
@pytest.mark.parametrize(
    "changes", [{}, {"prefetch": "exact"}, {"prefetch": "speculative"}, {"kv_location": "gpu"}, {"monitor": "widen"}]
)
def test_on_cuda_captured_steps_are_watched_like_the_cpus(changes: dict[str, Any], concentrated: Path) -> None:
    prompts = random_prompts(300, 120)
    labels = {"label_bits": 8, "label_channels": 2}
    answers, seen = {}, {}
    other = {name: value for name, value in changes.items() if name != "monitor"}
    for device, monitor in (("cuda", "off"), ("cuda", "warn"), ("cpu", "warn")):
        with make(
            concentrated, device, **(labels | {"monitor": monitor} | (changes if monitor == "warn" else other))
        ) as gen:
            outs = gen.generate(prompts, max_new_tokens=NEW)
        answers[device, monitor] = [out.token_ids for out in outs]
        seen[device, monitor] = outs[0].stats["monitor"]
    assert answers["cuda", "off"] == answers["cuda", "warn"]
    ours, theirs = seen["cuda", "warn"], seen["cpu", "warn"]
    assert ours["comparisons"] == theirs["comparisons"] == NEW - 1
    for name in ("attention_mass", "best_mass", "window_mass", "output_error"):
        assert ours[name] == pytest.approx(theirs[name], abs=0.02)
    assert ours["warning"] is None


@pytest.mark.gpu
def test_on_cuda_wrong_channels_are_warned_about_and_widened(concentrated: Path) -> None:
    prompt = random_prompts(300)[0]
    with make(concentrated, "cuda", label_bits=8, label_channels=2, monitor="widen") as gen:
        seen = with_wrong_channels(gen).generate(prompt, max_new_tokens=NEW).stats["monitor"]
    assert seen["token_budget"] == "1/4"
    assert seen["warning"] is not None and seen["selection_recall"] < 0.4
