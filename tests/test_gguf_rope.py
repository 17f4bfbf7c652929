"""RoPE scaling of GGUF files, which llama.cpp writes as metadata or, for Llama 3, as a tensor."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_case import tiny_llama, write_gguf

from ds_offload.errors import InputError
from ds_offload.loading import find_model, load_weights
from ds_offload.rope_scaling import trained_context

CPU = torch.device("cpu")
THETA, HEAD_DIM = 500_000.0, 16
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": THETA,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def llama3_factors(factor: float = 32.0, low: float = 1.0, high: float = 4.0, original: int = 8192) -> np.ndarray:
    """What frequencies are divided by, as llama.cpp's converter writes them."""
    factors = []
    for pair in range(HEAD_DIM // 2):
        turns = original * THETA ** (-2 * pair / HEAD_DIM) / (2 * math.pi)
        smooth = min(1.0, max(0.0, (turns - low) / (high - low)))
        factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, dtype=np.float32)


def check_as(path: Path, parameters: dict[str, Any], trained: int) -> None:
    """The file's model turns heads as transformers does with these RoPE parameters."""
    source = find_model(path)
    assert trained_context(source.config) == trained
    theirs = tiny_llama(rope_parameters=parameters, max_position_embeddings=source.config.max_position_embeddings)
    positions = torch.arange(trained)[None]
    for made, wanted in zip(
        load_weights(source, CPU).model.model.rotary_emb(torch.empty(0), positions),
        theirs.model.rotary_emb(torch.empty(0), positions),
        strict=True,
    ):
        torch.testing.assert_close(made, wanted, rtol=0, atol=1e-3 if trained > 4096 else 1e-5)


def base() -> Any:
    return tiny_llama(rope_parameters={"rope_type": "default", "rope_theta": THETA}, max_position_embeddings=131_072)


def test_llama_3s_frequency_factors_are_taken(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", base(), more={"rope_freqs.weight": llama3_factors()})
    check_as(tmp_path / "m.gguf", LLAMA3, 131_072)


@pytest.mark.parametrize(
    ("metadata", "parameters", "trained"),
    [
        ({}, {"rope_type": "default"}, 512),
        ({"llama.rope.scaling.type": "none"}, {"rope_type": "default"}, 512),
        (
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
            {"rope_type": "linear", "factor": 4.0},
            2048,
        ),
        ({"llama.rope.scale_linear": 4.0}, {"rope_type": "linear", "factor": 4.0}, 2048),
        (
            {
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": 4.0,
                "llama.rope.scaling.original_context_length": 128,
                "llama.rope.scaling.attn_factor": 1.0,
            },
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
            512,
        ),
        (
            {
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": 2.0,
                "llama.rope.scaling.yarn_beta_fast": 16.0,
            },
            {"rope_type": "yarn", "factor": 2.0, "beta_fast": 16.0, "original_max_position_embeddings": 512},
            1024,
        ),
    ],
)
def test_scaling_in_the_metadata_is_taken(
    metadata: dict[str, Any], parameters: dict[str, Any], trained: int, tmp_path: Path
) -> None:
    write_gguf(tmp_path / "m.gguf", tiny_llama(), metadata)
    check_as(tmp_path / "m.gguf", {"rope_theta": 10_000.0} | parameters, trained)


@pytest.mark.parametrize(
    ("metadata", "factors", "named"),
    [
        ({"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 4.0}, None, "longrope, factor 4"),
        ({"llama.rope.scaling.type": "yarn"}, None, "yarn, factor 0"),
        (
            {
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": 4.0,
                "llama.rope.scaling.yarn_log_multiplier": 0.5,
            },
            None,
            "scaling.yarn_log_multiplier=0.5",
        ),
        ({}, llama3_factors(low=2.0), "rope_freqs.weight"),
        ({"llama.rope.scaling.factor": 2.0}, llama3_factors(), "linear, and by rope_freqs.weight"),
    ],
)
def test_other_scaling_is_refused(
    metadata: dict[str, Any], factors: np.ndarray | None, named: str, tmp_path: Path
) -> None:
    write_gguf(tmp_path / "m.gguf", base(), metadata, {} if factors is None else {"rope_freqs.weight": factors})
    with pytest.raises(InputError, match=named) as caught:
        find_model(tmp_path / "m.gguf")
    assert "\n" not in str(caught.value)


def test_tensors_that_the_model_has_no_place_for_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    biased = {"blk.0.attn_q.bias": np.ones(64, dtype=np.float32), "rope_freqs.weight": np.ones(8, dtype=np.float32)}
    write_gguf(tmp_path / "m.gguf", tiny_llama(), more=biased)
    load_weights(find_model(tmp_path / "m.gguf"), CPU)
    assert "holds 1 weights that go unused, such as blk.0.attn_q.bias" in capsys.readouterr().err
