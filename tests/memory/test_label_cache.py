"""Label cache: prompts and appended tokens land at the same place with the same code."""

from __future__ import annotations

import torch

from ds_offload.kernels.label_codec import LabelLayout, decode_labels
from ds_offload.memory.label_cache import LabelCache

HEADS, DIM, LAYERS = 2, 16, 3


def make(capacities: list[int], layout: LabelLayout) -> tuple[LabelCache, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    channels = torch.stack([torch.randperm(DIM, generator=generator) for _ in range(LAYERS * HEADS)])
    channels = channels.view(LAYERS, HEADS, DIM)
    mean = torch.randn(LAYERS, HEADS, DIM, generator=generator)
    return LabelCache(layout, channels, mean, capacities, torch.device("cpu")), channels, mean


def test_appending_equals_writing_a_prompt() -> None:
    layout = LabelLayout(10, 2)
    capacities = [13, 7]
    keys = torch.randn(2, HEADS, 13, DIM, generator=torch.Generator().manual_seed(1))
    whole, _, _ = make(capacities, layout)
    stepwise, _, _ = make(capacities, layout)
    for number, capacity in enumerate(capacities):
        whole.write_prompt(1, number, 0, keys[number, :, :capacity])
        stepwise.write_prompt(1, number, 0, keys[number, :, :5])
        stepwise.write_prompt(1, number, 5, keys[number, :, 5:6])
    for position in range(6, 13):
        at = torch.tensor([position, min(position, 6)])
        stepwise.append(1, at, torch.stack([keys[n, :, int(at[n])] for n in range(2)]))
    assert torch.equal(whole.rows, stepwise.rows)
    assert not whole.rows[0].any() and not whole.rows[2].any()


def test_labels_are_the_kept_channels_less_their_mean_and_scores_use_the_same_channels() -> None:
    layout = LabelLayout(10, 16)
    cache, channels, mean = make([40], layout)
    keys = torch.randn(HEADS, 40, DIM)
    cache.write_prompt(2, 0, 0, keys)
    kept = channels[2, :, None, :10].expand(-1, 40, -1)
    expected = (keys - mean[2, :, None]).gather(-1, kept)
    assert torch.allclose(decode_labels(cache.rows[2], layout), expected, atol=2e-3)
    query = torch.randn(1, 4, DIM)
    scores = cache.scores(2, query, torch.tensor([33]), 40, 0.5)
    heads = channels[2, :, :10].repeat_interleave(2, 0)
    exact = 0.5 * torch.einsum("hr,htr->ht", query[0].gather(-1, heads), expected.repeat_interleave(2, 0))
    assert torch.allclose(scores[0, :, :33], exact[:, :33], atol=1e-2)
    assert (scores[0, :, 33:] == -torch.inf).all()
