"""The parts of a layer around attention: fused kernels give what the modules give, and run where they should."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import tiny_config
from transformers import AutoModelForCausalLM

from ds_offload.decode_layers import DecodeLayers
from ds_offload.decoder import DecoderStack

FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]


def decoder_of(family: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> DecoderStack:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(family), dtype=dtype).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            # Norms at 1 and biases at 0 would hide what is left out.
            torch.nn.init.normal_(parameter, 0.5)
    return DecoderStack(model.to(device))


def on_a_gpu(decoder: DecoderStack, dtype: torch.dtype = torch.bfloat16) -> Any:
    """What `DecodeLayers` asks of a model on a CUDA device, which need not be there."""
    return SimpleNamespace(blocks=decoder.blocks, device=torch.device("cuda"), dtype=dtype)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_fused_kernels_give_what_the_modules_give(family: str) -> None:
    decoder = decoder_of(family)
    parts, fused = (DecodeLayers(decoder, 3) for _ in range(2))
    assert not parts.fused
    fused.fused = True
    hidden = torch.randn(3, decoder.hidden_size, generator=torch.Generator().manual_seed(1))
    attention = torch.randn(3, decoder.heads * decoder.head_dim, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        for layer in range(decoder.layers):
            for ours, theirs in (
                (fused.project(layer, hidden), parts.project(layer, hidden)),
                (fused.project_query(layer, hidden), parts.project_query(layer, hidden)),
                (fused.finish(layer, hidden, attention), parts.finish(layer, hidden, attention)),
            ):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(fused.logits(hidden), parts.logits(hidden), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_layers_are_fused_on_a_gpu(family: str) -> None:
    assert DecodeLayers(on_a_gpu(decoder_of(family)), 16).fused


def test_what_is_not_fused(capsys: pytest.CaptureFixture[str]) -> None:
    assert not DecodeLayers(on_a_gpu(decoder_of("mixtral")), 1).fused
    plain = decoder_of("llama")
    assert not DecodeLayers(on_a_gpu(plain, torch.float64), 1).fused
    assert capsys.readouterr().err == ""
    assert not DecodeLayers(on_a_gpu(plain), 17).fused
    assert "17 sequences decode with the model's own layers; up to 16" in capsys.readouterr().err
    plain.blocks[1].mlp.act_fn = torch.nn.GELU()
    assert not DecodeLayers(on_a_gpu(plain), 1).fused
