"""The sampler against transformers' own generate and processors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessorList
from transformers.generation import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ds_offload.errors import InputError, LoadError
from ds_offload.sampling import Sampler, SamplingParams

VOCAB = 97


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        eos_token_id=None,
        bos_token_id=None,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval()


def decode(model: LlamaForCausalLM, prompt: list[int], params: SamplingParams, tokens: int) -> list[int]:
    """A plain loop: the whole sequence through the model at every step."""
    sampler = Sampler(params, prompt, "cpu")
    ids = list(prompt)
    for _ in range(tokens):
        with torch.no_grad():
            ids.append(sampler(model(torch.tensor([ids])).logits[0, -1].float()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("penalty", [None, 1.0, 1.3, 0.7])
def test_greedy_equals_generate(model: LlamaForCausalLM, penalty: float | None) -> None:
    prompt = [3, 14, 15, 92, 65, 35, 3]
    options: dict[str, Any] = {} if penalty is None else {"repetition_penalty": penalty}
    expected = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=24, pad_token_id=0, **options)
    got = decode(model, prompt, SamplingParams(repetition_penalty=penalty), 24)
    assert got == expected[0, len(prompt) :].tolist()


def test_the_penalty_changes_greedy_tokens(model: LlamaForCausalLM) -> None:
    """So that the comparison above means something."""
    prompt = [3, 14, 15, 92, 65, 35, 3]
    plain = decode(model, prompt, SamplingParams(), 24)
    assert decode(model, prompt, SamplingParams(repetition_penalty=1.3), 24) != plain


CASES = {
    "temperature": ({"temperature": 0.7}, [TemperatureLogitsWarper(0.7)]),
    "top-k": ({"temperature": 1.0, "top_k": 5}, [TopKLogitsWarper(5)]),
    "top-k beyond the vocabulary": ({"temperature": 1.0, "top_k": 1000}, []),
    "top-p": ({"temperature": 1.0, "top_p": 0.6}, [TopPLogitsWarper(0.6)]),
    "min-p": ({"temperature": 2.0, "min_p": 0.2}, [TemperatureLogitsWarper(2.0), MinPLogitsWarper(0.2)]),
    "all": (
        {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.2},
        [
            RepetitionPenaltyLogitsProcessor(1.2),
            TemperatureLogitsWarper(1.5),
            TopKLogitsWarper(20),
            TopPLogitsWarper(0.9),
            MinPLogitsWarper(0.05),
        ],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_processed_distribution(case: str) -> None:
    options, chain = CASES[case]
    prompt = [1, 2, 3, 3]
    logits = 3 * torch.randn(VOCAB, generator=torch.Generator().manual_seed(1))
    before = logits.clone()
    got = Sampler(SamplingParams(**options), prompt, "cpu").process(logits)
    expected = LogitsProcessorList(chain)(torch.tensor([prompt]), logits[None].clone())
    assert torch.equal(got, expected)
    assert torch.equal(logits, before), "the caller's logits must not change"


def test_processors_are_those_of_generate(model: LlamaForCausalLM) -> None:
    """The same classes in the same order as transformers makes from the same options."""
    options = {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.2}
    config = type(model.generation_config)(do_sample=True, **options)
    expected = model._get_logits_processor(config, input_ids_seq_length=4)
    assert [type(p) for p in SamplingParams(**options).processors()] == [type(p) for p in expected]


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -20.0])
    sampler = Sampler(SamplingParams(temperature=1.0, seed=5), [0], "cpu")
    counts = torch.bincount(torch.tensor([sampler(logits) for _ in range(4000)]), minlength=5)
    assert torch.allclose(counts / 4000, logits.softmax(0), atol=0.03)


def test_the_seed_repeats_and_does_not_depend_on_others() -> None:
    logits = torch.randn(200, VOCAB, generator=torch.Generator().manual_seed(2))

    def draws(seed: int | None) -> list[int]:
        torch.manual_seed(0)  # the global generator plays no part
        sampler = Sampler(SamplingParams(temperature=1.0, seed=seed), [0], "cpu")
        return [sampler(row) for row in logits]

    alone = draws(7)
    first = Sampler(SamplingParams(temperature=1.0, seed=7), [0], "cpu")
    second = Sampler(SamplingParams(temperature=1.0, seed=8), [0], "cpu")
    together = []
    for row in logits:
        together.append(first(row))
        second(row)
    assert alone == together == draws(7)
    assert alone != draws(8)
    assert draws(None) != draws(None)


def test_generated_tokens_are_penalised_too() -> None:
    logits = torch.tensor([1.0, 0.9, 0.8, -1.0])
    sampler = Sampler(SamplingParams(repetition_penalty=2.0), [3], "cpu")
    assert [sampler(logits) for _ in range(3)] == [0, 1, 2]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_refused(value: float, temperature: float) -> None:
    logits = torch.zeros(5)
    sampler = Sampler(SamplingParams(temperature=temperature, top_k=2 if temperature else None), [0], "cpu")
    sampler(logits)
    logits[3] = value
    with pytest.raises(LoadError, match="not finite"):
        sampler(logits)


@pytest.mark.parametrize("penalty", [0.01, 100])
@pytest.mark.parametrize("temperature", [1e-4, 1.0])
def test_the_strongest_penalties_can_be_drawn_with(penalty: float, temperature: float) -> None:
    sampler = Sampler(SamplingParams(repetition_penalty=penalty, temperature=temperature, seed=1), [0, 1], "cpu")
    logits = torch.tensor([-100.0, 100.0, 1.0])
    assert torch.isfinite(sampler.process(logits)).all() and 0 <= sampler(logits) < 3


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", "2.9"),
        ("max_new_tokens", "64q"),
        ("temperature", -0.1),
        ("temperature", 1e-9),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", True),
        ("top_k", -1),
        ("top_k", 2.5),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("min_p", -0.1),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("repetition_penalty", -1.0),
        ("repetition_penalty", 1e-40),
        ("repetition_penalty", 100.5),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", [1]),
        ("seed", -1),
        ("seed", 2**63),
        ("seed", 1.5),
    ],
)
def test_values_out_of_range(field: str, value: Any) -> None:
    with pytest.raises(InputError) as caught:
        SamplingParams(**{field: value})
    assert field in str(caught.value) and "\n" not in str(caught.value)


def test_stop_takes_every_form() -> None:
    assert SamplingParams(stop=None).stop == SamplingParams().stop == ()
    assert SamplingParams(stop="a").stop == ("a",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    assert SamplingParams(max_new_tokens="1k").max_new_tokens == 1024


def test_options_without_effect_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    SamplingParams(top_p=0.9, top_k=5)
    assert "top_k, top_p has no effect" in capsys.readouterr().err
    SamplingParams(top_p=1.0, top_k=0)
    SamplingParams(top_p=0.9, temperature=0.5)
    assert capsys.readouterr().err == ""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_the_gpu() -> None:
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(3))
    params = SamplingParams(temperature=0.8, top_k=10, repetition_penalty=1.1, seed=1)
    on_gpu, again = (Sampler(params, [1, 2], "cuda") for _ in range(2))
    assert [on_gpu(logits.cuda()) for _ in range(20)] == [again(logits.cuda()) for _ in range(20)]
    cpu, gpu = (Sampler(params, [1, 2], device).process(logits.to(device)) for device in ("cpu", "cuda"))
    torch.testing.assert_close(gpu.cpu(), cpu)
