"""The Triton kernel of label scores on CPU tensors; run by test_label_scores.py under TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch

from ds_offload.kernels.label_codec import LabelLayout, encode_labels
from ds_offload.kernels.label_scores import _launch, label_scores_reference


@pytest.mark.parametrize("bits", [16, 8, 4, 2])
@pytest.mark.parametrize(("channels", "group"), [(1, 1), (7, 3), (28, 3), (33, 4), (60, 1), (64, 12), (130, 2)])
def test_kernel_equals_the_reference(channels: int, group: int, bits: int) -> None:
    generator = torch.Generator().manual_seed(channels)
    layout = LabelLayout(channels, bits)
    labels = encode_labels(torch.randn(2, 300, channels, generator=generator), layout)
    query = torch.randn(3, 2 * group, channels, generator=generator)
    starts, lengths = torch.tensor([0, 133, 299]), torch.tensor([133, 160, 0])
    out = torch.full((3, 2 * group, 170), torch.nan)
    _launch(labels, layout, query, starts, lengths, 170, 0.3, out)
    expected = label_scores_reference(labels, layout, query, starts, lengths, 170, 0.3)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=2e-5)


def test_many_blocks_and_no_tokens() -> None:
    layout = LabelLayout(28, 2)
    labels = encode_labels(torch.randn(1, 1500, 28, generator=torch.Generator().manual_seed(0)), layout)
    query = torch.ones(1, 1, 28)
    out = torch.full((1, 1, 1600), torch.nan)
    _launch(labels, layout, query, torch.tensor([0]), torch.tensor([1500]), 1600, 1.0, out)
    expected = label_scores_reference(labels, layout, query, torch.tensor([0]), torch.tensor([1500]), 1600, 1.0)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=2e-5)
    _launch(labels, layout, query, torch.tensor([0]), torch.tensor([0]), 0, 1.0, out[..., :0])
