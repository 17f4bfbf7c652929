"""Parts of a prompt's layers around attention: fused launches give what the modules give, and run where they should."""

from __future__ import annotations

import pytest
import torch
from test_decode_layers import FAMILIES, decoder_of, on_a_gpu

from ds_offload.prefill_layers import PrefillLayers

TOLERANCES = [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)]


def check(family: str, device: str, dtype: torch.dtype, tolerance: float) -> None:
    decoder = decoder_of(family, device, dtype)
    parts, fused = (PrefillLayers(decoder) for _ in range(2))
    parts.fused, fused.fused = False, True
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(19, decoder.hidden_size, generator=generator).to(device, dtype)
    attention = torch.randn(19, decoder.heads * decoder.head_dim, generator=generator).to(device, dtype)
    rope = decoder.rotary(torch.arange(5, 24, device=device))
    with torch.no_grad():
        for layer in range(decoder.layers):
            made = []
            for work in (fused, parts):
                queries = torch.full((19, decoder.heads, decoder.head_dim), torch.nan, device=device, dtype=dtype)
                staging = torch.full((decoder.kv_heads, 40, 2, decoder.head_dim), torch.nan, device=device, dtype=dtype)
                work.project(layer, hidden, rope, queries, staging[:, 10:29])
                states = torch.cat((hidden, hidden))
                work.finish_(layer, states[19:], attention)
                assert torch.equal(states[:19], hidden)
                made.append((queries, staging, states))
            for ours, theirs in zip(*made, strict=True):
                # What is not written is not a number in both. In bfloat16 each of the two rounds at places of its
                # own, by up to 1 % of the whole and, where large numbers cancel, by far more of a single one.
                assert torch.equal(ours.isnan(), theirs.isnan())
                ours, theirs = (value.nan_to_num().double() for value in (ours, theirs))
                assert (ours - theirs).norm() <= tolerance * theirs.norm()


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_fused_launches_give_what_the_modules_give(family: str, dtype: torch.dtype, tolerance: float) -> None:
    check(family, "cpu", dtype, tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize("family", FAMILIES)
def test_on_a_gpu(family: str, dtype: torch.dtype, tolerance: float) -> None:
    check(family, "cuda", dtype, tolerance)


@pytest.mark.parametrize("family", [*FAMILIES, "mixtral"])
def test_plain_layers_are_fused_on_a_gpu(family: str) -> None:
    assert PrefillLayers(on_a_gpu(decoder_of(family))).fused == (family != "mixtral")
    assert not PrefillLayers(decoder_of(family)).fused
