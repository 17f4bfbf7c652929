"""What labels promise against what their tokens really have, and what is asked of them for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from product_cases import product_code
from tiny_models import random_prompts, save_tiny, tiny_config

from ds_offload import OffloadConfig, OffloadedGenerator
from ds_offload.codebooks import fit_codes
from ds_offload.label_mass import LEAST_TOKENS, SHARES, asking, label_mass, shares_for
from ds_offload.memory.label_cache import LabelCache
from ds_offload.memory.label_code import ProductLabels
from ds_offload.memory.window import AttentionWindow
from ds_offload.prefetch.selection import Selector, Step

TOKENS, KV_HEADS, GROUP, HEAD_DIM = 600, 2, 3, 16


def tensors() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    query = torch.randn(len(asking(TOKENS)), KV_HEADS * GROUP, HEAD_DIM, generator=generator)
    return query * 2, torch.randn(TOKENS, KV_HEADS, HEAD_DIM, generator=generator)


def test_it_is_the_exact_attention_of_what_a_selector_takes() -> None:
    """For two shares, query by query, with a label cache and the selection of a decode step."""
    query, key = tensors()
    code = product_code(1, KV_HEADS, head_dim=HEAD_DIM)
    labels = LabelCache(ProductLabels(code, torch.device("cpu")), [TOKENS], torch.device("cpu"))
    labels.write_prompt(0, 0, 0, key.transpose(0, 1))
    window = AttentionWindow(4, 64)
    mass = label_mass(query, key, code.layer(0), 0.25)
    for number in (2, 6):
        found = []
        for position, each in zip(asking(TOKENS).tolist(), query, strict=True):
            # The last key that a query sees here is the one before its own: the current token has no label yet.
            length = position + 1
            step = Step.make([length], [length], window, torch.device("cpu"))
            chosen = Selector(labels, window, 0.25, [SHARES[number]]).select(0, each[None], step).tokens[0]
            for head in range(KV_HEADS):
                group = each[head * GROUP : (head + 1) * GROUP]
                exact = (group @ key[:position, head].T * 0.25).softmax(-1).mean(0)
                kept = chosen[head][chosen[head] >= 0]
                forced = torch.cat((torch.arange(4), torch.arange(position - 64, position)))
                if len(kept):
                    found.append(exact[kept].sum() + exact[forced].sum())
        torch.testing.assert_close(mass[number], torch.stack(found).mean(), atol=3e-3, rtol=0)


def test_fitted_words_keep_their_promise_better_than_words_of_nothing() -> None:
    query, key = tensors()
    of_group = query.unflatten(1, (KV_HEADS, -1)).transpose(0, 1).flatten(1, 2).double()
    fitted = label_mass(query, key, fit_codes(key.transpose(0, 1), of_group.mT @ of_group), 0.25)
    nothing = label_mass(query, key, product_code(KV_HEADS, head_dim=HEAD_DIM, seed=9), 0.25)
    share = torch.tensor(SHARES)
    assert ((fitted - share)[:10].abs() < (nothing - share)[:10].abs()).all()
    assert (nothing[:10] < share[:10] - 0.01).all()


def test_a_share_is_asked_for_by_what_it_gave() -> None:
    even = torch.tensor(SHARES)
    mass = torch.stack((even, even / 2, even.sqrt()))
    first, second, third = shares_for(mass, 0.9, 3)
    assert first == pytest.approx(0.9)
    # Half of the most that was measured is less than 0.9: all there is.
    assert second == SHARES[-1]
    assert third == pytest.approx(0.9**2, abs=5e-3)
    assert shares_for(mass, 0.25, 3)[1] == pytest.approx(0.5)
    assert shares_for(mass, 0.2, 3)[0] == pytest.approx(0.2)
    assert shares_for(mass, 1.0, 3) == [1.0, 1.0, 1.0]
    assert shares_for(None, 0.9, 2) == [0.9, 0.9]


def test_a_mass_that_falls_by_noise_is_read_from_below() -> None:
    mass = torch.tensor(SHARES)[None].clone()
    mass[0, 3] = mass[0, 2] - 0.01
    (share,) = shares_for(mass, SHARES[3], 1)
    assert SHARES[3] <= share <= SHARES[4]


@pytest.mark.parametrize(("changes", "said"), [({}, False), ({"label_bits": 2}, True)])
def test_a_top_p_budget_says_once_where_nothing_corrects_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, int], said: bool
) -> None:
    save_tiny(tmp_path, tiny_config("llama"))
    config = OffloadConfig(max_context=1024, token_budget="top-p:0.9", **changes)
    with OffloadedGenerator.from_pretrained(str(tmp_path), config=config, device="cpu") as generator:
        for _ in range(2):
            generator.generate(random_prompts(LEAST_TOKENS)[0], max_new_tokens=2)
    assert capsys.readouterr().err.count("taken at their word") == int(said)
