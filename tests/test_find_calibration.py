"""Where a calibration comes from: a given file, the cache, the shipped text or the prompt."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from calibration_case import FINGERPRINT, NAMES, loaded_model, same, small_calibration, token_ids

from ds_offload import calibration as calibration_module
from ds_offload.calibration import (
    Calibration,
    cached_calibration,
    calibrate,
    find_or_make_calibration,
    text_ids,
)
from ds_offload.decoder import DecoderStack
from ds_offload.errors import InputError, LoadError


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DS_OFFLOAD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(calibration_module, "shipped_text", lambda: "A lamp burned in the window. " * 200)
    return tmp_path / "cache" / "calibration" / f"{FINGERPRINT}.safetensors"


def never(*_: object, **__: object) -> Calibration:
    raise AssertionError("calibrated again")


def test_made_once_and_found_from_then_on(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = loaded_model()
    decoder = DecoderStack(loaded.model)
    first = find_or_make_calibration(loaded, decoder, None)
    assert cached_calibration(FINGERPRINT) == cache
    assert (first.tokens, first.text) == (4096, "the shipped text")
    assert "calibrating tiny on 4,096 tokens of the shipped text" in capsys.readouterr().err
    monkeypatch.setattr(calibration_module, "calibrate", never)
    assert same(find_or_make_calibration(loaded, decoder, None), first)
    assert capsys.readouterr().err == ""
    other = loaded_model(fingerprint="f" * 64)
    with pytest.raises(AssertionError, match="calibrated again"):
        find_or_make_calibration(other, DecoderStack(other.model), None)


@pytest.mark.parametrize("damage", ["truncated", "other shape", "folder", "no codes"])
def test_a_damaged_cache_file_is_said_and_made_again(
    cache: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = loaded_model()
    decoder = DecoderStack(loaded.model)
    first = find_or_make_calibration(loaded, decoder, None)
    sound = cache.read_bytes()
    if damage == "truncated":
        cache.write_bytes(sound[:-1])
    elif damage == "other shape":
        dataclasses.replace(first, codes=None, **{n: getattr(first, n)[1:] for n in NAMES}).save(cache)
    elif damage == "no codes":
        dataclasses.replace(first, codes=None).save(cache)
    else:
        cache.unlink()
        cache.mkdir()
    capsys.readouterr()
    assert same(find_or_make_calibration(loaded, decoder, None), first)
    said = capsys.readouterr().err
    assert f"{cache} " in said
    assert "; making it again" in said
    if damage == "folder":
        assert "the calibration is not kept for next time: cannot write" in said
    else:
        assert cache.read_bytes() == sound


def test_a_cache_that_cannot_be_written_is_said(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    loaded = loaded_model()
    made = find_or_make_calibration(loaded, DecoderStack(loaded.model), None)
    assert made.channels.shape == (3, 2, 12)
    assert "the calibration is not kept for next time" in capsys.readouterr().err


def test_dummy_weights_are_calibrated_in_memory(cache: Path) -> None:
    loaded = loaded_model(load_format="dummy")
    made = find_or_make_calibration(loaded, DecoderStack(loaded.model), None)
    assert (made.tokens, made.text) == (2048, "the shipped text")
    assert not cache.parent.exists()


@pytest.mark.parametrize("count", [1, 5, 5000])
def test_without_a_tokenizer_the_prompt_is_the_text(cache: Path, count: int) -> None:
    loaded = loaded_model(tokenizer=False)
    decoder, ids = DecoderStack(loaded.model), token_ids(count)
    made = find_or_make_calibration(loaded, decoder, None, ids)
    assert made.tokens == min(count, 4096)
    expected = calibrate(decoder, ids[:4096], fingerprint=FINGERPRINT, text="the prompt", block=128, span=128)
    assert same(made, expected)
    assert not cache.parent.exists()


def test_without_tokenizer_and_prompt_it_says_what_to_do(cache: Path) -> None:
    loaded = loaded_model(tokenizer=False)
    with pytest.raises(InputError, match="tiny has no tokenizer to calibrate with; give a prompt of token ids"):
        find_or_make_calibration(loaded, DecoderStack(loaded.model), None)
    with pytest.raises(InputError, match="tiny has no tokenizer"):
        text_ids(loaded, "a text")


@pytest.fixture
def made() -> Calibration:
    return small_calibration()


def test_a_given_file_is_used_and_checked(made: Calibration, cache: Path, tmp_path: Path) -> None:
    loaded = loaded_model()
    decoder = DecoderStack(loaded.model)
    made.save(tmp_path / "mine")
    assert same(find_or_make_calibration(loaded, decoder, str(tmp_path / "mine")), made)
    other = loaded_model("MHA")
    with pytest.raises(LoadError, match="3 layers x 2 KV heads x 12 channels, but this model has 3 x 4 x 12"):
        find_or_make_calibration(other, DecoderStack(other.model), str(tmp_path / "mine"))
    with pytest.raises(LoadError, match="there is no calibration"):
        find_or_make_calibration(loaded, decoder, str(tmp_path / "missing"))
    assert not cache.parent.exists()


@pytest.mark.parametrize("name", ["channels.json", "channels"])
def test_a_reference_channel_file_is_imported(
    cache: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = loaded_model()
    rankings = {
        layer: [torch.randperm(12, generator=torch.Generator().manual_seed(2 * layer + h)).tolist() for h in range(2)]
        for layer in range(3)
    }
    path = tmp_path / name
    path.write_text(json.dumps({f"model.layers.{n}.self_attn.qk_proj": lists for n, lists in rankings.items()}))
    imported = find_or_make_calibration(loaded, DecoderStack(loaded.model), str(path))
    assert imported.channels.tolist() == [rankings[n] for n in range(3)]
    assert imported.key_mean.eq(0).all()
    assert imported.importance[1, 0, rankings[1][0][0]] == 12
    assert imported.importance[1, 0, rankings[1][0][-1]] == 1
    assert (imported.fingerprint, imported.tokens) == (FINGERPRINT, 0)
    assert "cannot be checked" in capsys.readouterr().err
    imported.save(tmp_path / "saved")
    assert same(Calibration.load(tmp_path / "saved", FINGERPRINT), imported)


def test_a_json_file_that_is_cut_short_is_refused_as_one(cache: Path, tmp_path: Path) -> None:
    loaded = loaded_model()
    (tmp_path / "c.json").write_text('{"model.layers.0.self_attn.qk_proj": [[0, 1')
    with pytest.raises(LoadError, match="not JSON, or is cut short"):
        find_or_make_calibration(loaded, DecoderStack(loaded.model), str(tmp_path / "c.json"))
