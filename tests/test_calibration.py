"""Calibration: the statistic against its definition."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from calibration_case import FAMILIES, FINGERPRINT, loaded_model, same, tiny_model, token_ids
from torch import Tensor
from transformers import PreTrainedModel

from ds_offload.calibration import Calibration, calibrate, calibrate_loaded
from ds_offload.decoder import DecoderStack
from ds_offload.errors import InputError, LoadError
from ds_offload.label_mass import LEAST_TOKENS, SHARES


def queries_and_keys(model: PreTrainedModel, ids: list[int]) -> tuple[list[Tensor], list[Tensor]]:
    """q `[N, H, D]` and k `[N, Hkv, D]` of each layer, from transformers' own forward pass of one context."""
    seen: dict[tuple[int, str], Tensor] = {}
    hooks = []
    for number, layer in enumerate(model.model.layers):
        for name in ("q", "k"):
            module = getattr(layer.self_attn, f"{name}_norm", None) or getattr(layer.self_attn, f"{name}_proj")
            hooks.append(
                module.register_forward_hook(
                    lambda _, __, out, key=(number, name): seen.__setitem__(key, out.reshape(len(ids), -1, 12))
                )
            )
    with torch.no_grad():
        model(torch.tensor([ids]), use_cache=False)
    for hook in hooks:
        hook.remove()
    frequencies = 1.0 / 10000.0 ** (torch.arange(0, 12, 2, dtype=torch.float64) / 12)
    angles = torch.arange(len(ids), dtype=torch.float64)[:, None, None] * frequencies

    def rotate(rows: Tensor) -> Tensor:
        first, second = rows.chunk(2, -1)
        return torch.cat(
            [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], -1
        )

    layers = range(len(model.model.layers))
    return [rotate(seen[n, "q"]) for n in layers], [rotate(seen[n, "k"]) for n in layers]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("count", "block"), [(1, 64), (37, 64), (50, 16), (48, 16), (33, 32)])
def test_statistic_is_the_mean_product_over_all_pairs(family: str, count: int, block: int) -> None:
    model, ids = tiny_model(family), token_ids(count)
    made = calibrate(DecoderStack(model), ids, fingerprint=FINGERPRINT, text="t", block=block)
    contexts = [queries_and_keys(model, ids[start : start + block]) for start in range(0, count, block)]
    groups = model.config.num_attention_heads // model.config.num_key_value_heads
    for layer in range(3):
        query = torch.cat([queries[layer] for queries, _ in contexts])
        key = torch.cat([keys[layer] for _, keys in contexts])
        for head in range(key.shape[1]):
            expected = sum(
                (query[:, None, h] * key[None, :, head]).abs().mean((0, 1))
                for h in range(head * groups, (head + 1) * groups)
            )
            torch.testing.assert_close(made.importance[layer, head].double(), expected, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(made.key_mean[layer, head].double(), key[:, head].mean(0), rtol=1e-4, atol=1e-5)
            assert made.channels[layer, head].tolist() == sorted(
                range(12), key=lambda c: (-made.importance[layer, head, c].item(), c)
            )
    assert (made.tokens, made.text, made.fingerprint) == (count, "t", FINGERPRINT)


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_are_divided_by_the_root_of_their_size_over_their_queries(family: str) -> None:
    model, ids = tiny_model(family), token_ids(40)
    made = calibrate(DecoderStack(model), ids, fingerprint=FINGERPRINT, text="t")
    queries, keys = queries_and_keys(model, ids)
    for layer, factor in enumerate(made.key_factor):
        # Pairs that RoPE turns together, [tokens, heads, 2, pairs].
        key, query = (rows[layer].unflatten(-1, (2, -1)).square().sum(2) for rows in (keys, queries))
        query = query.unflatten(1, (key.shape[1], -1)).sum(2)
        expected = (key.sum(0).sqrt() / query.sum(0).sqrt()).sqrt()
        torch.testing.assert_close(factor.double(), torch.cat((expected, expected), -1), rtol=1e-5, atol=1e-6)


def test_ties_rank_by_channel_number() -> None:
    importance = torch.arange(256).remainder(3).float().expand(1, 1, -1)
    ranked = Calibration.rank(importance, torch.zeros(1, 1, 256), fingerprint="f", tokens=1, text="t")
    assert ranked.channels[0, 0].tolist() == [*range(2, 256, 3), *range(1, 256, 3), *range(0, 256, 3)]


def test_every_block_counts() -> None:
    decoder, ids = DecoderStack(tiny_model()), token_ids(32)
    one = calibrate(decoder, ids[:16] + ids[16:], fingerprint="f", text="t", block=16)
    other = calibrate(decoder, ids[16:] + ids[:16], fingerprint="f", text="t", block=16)
    torch.testing.assert_close(one.importance, other.importance)
    last_only = calibrate(decoder, ids[16:], fingerprint="f", text="t", block=16)
    assert not torch.allclose(one.importance, last_only.importance, rtol=1e-3)


def test_blocks_stay_within_the_trained_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = loaded_model(max_position_embeddings=24)
    decoder = DecoderStack(loaded.model)
    furthest = []
    rotary = decoder.rotary
    monkeypatch.setattr(decoder, "rotary", lambda positions: furthest.append(int(positions.max())) or rotary(positions))
    calibrate_loaded(loaded, decoder, token_ids(60), "t")
    # Of each block once where its tokens are scattered, for the codes, and once as they stand.
    assert furthest[1::2] == [23, 23, 11] and max(furthest[::2]) <= 23


def test_progress_counts_every_layer_of_every_block() -> None:
    seen: list[tuple[int, int]] = []
    calibrate(
        DecoderStack(tiny_model()),
        token_ids(40),
        fingerprint="f",
        text="t",
        block=16,
        on_progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(n, 9) for n in range(1, 10)]


def test_codes_take_every_token_at_a_position_of_its_own() -> None:
    model, ids = tiny_model(), token_ids(50)
    decoder = DecoderStack(model)
    unturned, spread = (
        calibrate(decoder, ids, fingerprint="f", text="t", block=64, span=span).codes for span in (1, 4096)
    )
    assert unturned is not None and spread is not None
    # With one position to choose from nothing is turned.
    _, keys = queries_and_keys(model, ids)
    with torch.no_grad():
        first = decoder.blocks[0]
        plain = first.self_attn.k_proj(first.input_layernorm(decoder.embed(torch.tensor(ids)))).view(50, 2, 12)
    torch.testing.assert_close(unturned.mean[0].double(), plain.mean(0), rtol=1e-4, atol=1e-5)
    # The fast pairs of keys at many positions cancel out; the text's own positions turn the slow ones less.
    assert (spread.mean[0].norm(dim=-1) < 0.8 * keys[0].mean(0).norm(dim=-1)).all()
    torch.testing.assert_close(
        unturned.basis.double() @ unturned.turn.double(), torch.eye(12).double().expand(3, 2, -1, -1), rtol=0, atol=1e-3
    )


def test_no_tokens_and_values_that_are_not_finite_are_refused() -> None:
    decoder = DecoderStack(tiny_model())
    with pytest.raises(InputError, match="no tokens"):
        calibrate(decoder, [], fingerprint="f", text="t")
    model = tiny_model()
    model.model.layers[1].self_attn.k_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(LoadError, match="not finite in float64"):
        calibrate(DecoderStack(model), token_ids(8), fingerprint="f", text="t")


def test_masses_are_kept_where_contexts_are_long_enough(tmp_path: Path) -> None:
    ids = token_ids(LEAST_TOKENS)
    decoder = DecoderStack(tiny_model(max_position_embeddings=LEAST_TOKENS))
    made = calibrate(decoder, ids, block=LEAST_TOKENS, fingerprint=FINGERPRINT, text="t")
    assert made.label_mass is not None and made.label_mass.shape == (len(made.channels), len(SHARES))
    # More that labels promise is more that there is; all is all.
    assert (made.label_mass.diff(dim=-1) >= 0).all() and (made.label_mass[:, -1] > 0.97).all()
    made.save(tmp_path / "c")
    assert same(Calibration.load(tmp_path / "c", FINGERPRINT), made)
    judged = calibrate(decoder, ids + token_ids(100, 2), block=LEAST_TOKENS, fingerprint=FINGERPRINT, text="t")
    assert judged.label_mass is not None
    assert judged.label_mass.mean() < made.label_mass.mean(), "by other keys than those that words were fitted to"
    short = calibrate(decoder, ids[1:], block=LEAST_TOKENS, fingerprint=FINGERPRINT, text="t")
    assert short.label_mass is None
