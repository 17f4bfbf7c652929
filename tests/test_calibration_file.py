"""The file of a calibration: whole or not at all, and refused where it is not what it says."""

from __future__ import annotations

import dataclasses
import os
import stat
from pathlib import Path

import pytest
import safetensors.torch
import torch
from calibration_case import FINGERPRINT, NAMES, same, small_calibration, tiny_model, token_ids
from torch import Tensor

from ds_offload.calibration import (
    Calibration,
    calibrate,
)
from ds_offload.calibration_file import check_calibration, has_codes
from ds_offload.decoder import DecoderStack
from ds_offload.errors import InputError, LoadError
from ds_offload.label_mass import SHARES


@pytest.fixture
def made() -> Calibration:
    return small_calibration()


def test_round_trip(made: Calibration, tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    made.save(path)
    assert same(Calibration.load(path, FINGERPRINT), made)
    assert os.listdir(tmp_path) == ["c.safetensors"]
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def test_calibrating_twice_gives_identical_bytes(made: Calibration, tmp_path: Path) -> None:
    again = calibrate(DecoderStack(tiny_model()), token_ids(30), fingerprint=FINGERPRINT, text="a text: ünïcode, 文")
    for number in range(8):
        made.save(tmp_path / f"a{number}")
    again.save(tmp_path / "b")
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def test_two_texts_give_different_files(made: Calibration, tmp_path: Path) -> None:
    decoder = DecoderStack(tiny_model())
    other = calibrate(decoder, token_ids(30, seed=2), fingerprint=FINGERPRINT, text=made.text)
    made.save(tmp_path / "a")
    other.save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() != (tmp_path / "b").read_bytes()


def test_saving_replaces_a_file_whole_or_not_at_all(
    made: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c"
    path.write_bytes(b"what was there")

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        with pytest.raises(InputError, match="No space left"):
            made.save(path)
    assert path.read_bytes() == b"what was there"
    assert os.listdir(tmp_path) == ["c"]
    with open(path, "rb") as reader:
        made.save(path)
        assert reader.read() == b"what was there", "written over rather than replaced"
    assert same(Calibration.load(path, FINGERPRINT), made)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("", "not a regular file"),
        ("no/c", "there is no folder"),
        ("file/c", "there is no folder"),
        ("n" * 300, "cannot write"),
    ],
)
def test_places_that_cannot_be_written(made: Calibration, tmp_path: Path, place: str, message: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=message) as caught:
        made.save(tmp_path / place)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["file"]


def test_saving_never_replaces_a_device(made: Calibration) -> None:
    with pytest.raises(InputError, match="/dev/null: it is not a regular file"):
        made.save("/dev/null")


def refused(path: Path, fingerprint: str = FINGERPRINT) -> str:
    with pytest.raises(LoadError) as caught:
        Calibration.load(path, fingerprint)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    assert message.endswith("ds-offload calibrate --model M")
    return message


@pytest.mark.parametrize("share", [0.0, 0.001, 0.05, 0.2, 0.5, 0.9, 0.99999])
def test_truncated_files_are_refused(made: Calibration, tmp_path: Path, share: float) -> None:
    made.save(tmp_path / "c")
    data = (tmp_path / "c").read_bytes()
    (tmp_path / "c").write_bytes(data[: int(share * len(data))])
    assert "cut short" in refused(tmp_path / "c")


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("Call me Ishmael. Some years ago, never mind how long precisely.")
    assert "no calibration" in refused(tmp_path / "text")
    safetensors.torch.save_file({"weight": torch.ones(3)}, tmp_path / "weights")
    assert "is a safetensors file, but no calibration" in refused(tmp_path / "weights")
    assert "is not a file" in refused(tmp_path)
    assert "there is no calibration" in refused(tmp_path / "missing")
    assert "is not a file" in refused(Path("/dev/zero"))
    with open(tmp_path / "huge", "wb") as file:
        file.truncate(2**40)
    assert "1,099,511,627,776 bytes" in refused(tmp_path / "huge")


def test_what_is_no_calibration_is_told_from_its_beginning(made: Calibration, tmp_path: Path) -> None:
    """A channel file is JSON, whose layers a model decides about."""
    made.save(tmp_path / "made")
    check_calibration(str(tmp_path / "made"))
    (tmp_path / "channels").write_text(' {"model.layers.0.self_attn.k_proj": [[0]]}')
    check_calibration(str(tmp_path / "channels"))
    safetensors.torch.save_file({"a": torch.zeros(2)}, tmp_path / "weights")
    (tmp_path / "text").write_text("no calibration, whatever its first 8 bytes say")
    (tmp_path / "empty").touch()
    for name in ("weights", "text", "empty"):
        with pytest.raises(LoadError, match=f"{name} is no calibration, or is cut short or damaged; make one with"):
            check_calibration(str(tmp_path / name))


def test_the_wrong_model_is_named(made: Calibration, tmp_path: Path) -> None:
    made.save(tmp_path / "c")
    message = refused(tmp_path / "c", "f" * 64)
    assert "made for another model (fingerprint '01234567' ≠ 'ffffffff')" in message


def mass_of(made: Calibration) -> Tensor:
    """As a calibration of longer contexts would have it."""
    return torch.linspace(0.4, 1, len(SHARES)).expand(len(made.channels), -1).contiguous()


def rewritten(made: Calibration, path: Path, metadata: dict[str, str] | None = None, **tensors: Tensor | None) -> Path:
    """`made` in a file with other metadata or tensors."""
    held = {name: getattr(made, name) for name in NAMES}
    held |= {f"code_{name}": getattr(made.codes, name) for name in ("mean", "basis", "turn", "words")}
    held["label_mass"] = mass_of(made)
    held |= {name: tensor for name, tensor in tensors.items() if tensor is not None}
    held = {name: tensor.contiguous() for name, tensor in held.items() if tensors.get(name, tensor) is not None}
    about = {
        "format": "ds_offload.calibration",
        "version": "4",
        "fingerprint": FINGERPRINT,
        "tokens": "30",
        "text": "t",
    }
    safetensors.torch.save_file(held, path, about | (metadata or {}))
    return path


def test_a_newer_version_is_refused_before_anything_else(made: Calibration, tmp_path: Path) -> None:
    message = refused(rewritten(made, tmp_path / "c", {"version": "5", "fingerprint": "other"}, more=torch.ones(1)))
    assert "has format version 5, and this version of ds-offload reads up to 4; update ds-offload" in message


def test_an_older_version_is_refused(made: Calibration, tmp_path: Path) -> None:
    message = refused(rewritten(made, tmp_path / "c", {"version": "1"}, key_factor=None))
    assert "has format version 1, of an older ds-offload; make one with" in message


def test_version_2_has_no_codes_version_3_no_masses_and_both_are_read(made: Calibration, tmp_path: Path) -> None:
    without = dict.fromkeys(("code_mean", "code_basis", "code_turn", "code_words", "label_mass"))
    path = rewritten(made, tmp_path / "c", {"version": "2"}, **without)
    assert same(Calibration.load(path, FINGERPRINT), dataclasses.replace(made, codes=None, text="t"))
    assert not has_codes(str(path)) and has_codes(None)
    path = rewritten(made, tmp_path / "c", {"version": "3"}, label_mass=None)
    assert same(Calibration.load(path, FINGERPRINT), dataclasses.replace(made, text="t"))
    assert has_codes(str(rewritten(made, tmp_path / "c")))
    path.write_text("{}")
    assert not has_codes(str(path))


@pytest.mark.parametrize("content", ["{      \n5", "[" * 200_000, '{"a":   ' + "[" * 200_000], ids=["5", "[", "{["])
def test_json_that_is_no_calibration_has_no_codes(content: str, tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text(content, encoding="utf-8")
    assert not has_codes(str(path))


def test_files_that_contradict_themselves_are_refused(made: Calibration, tmp_path: Path) -> None:
    path = tmp_path / "c"
    sound = dataclasses.replace(made, text="t", label_mass=mass_of(made))
    assert same(Calibration.load(rewritten(made, path), FINGERPRINT), sound), "the file is sound before it is spoilt"
    spoilt_importance = made.importance.clone()
    spoilt_importance[0, 0, 0] = torch.inf
    swapped = made.channels.clone()
    swapped[1, 1, :2] = swapped[1, 1, :2].flip(0)
    cases: list[dict[str, Tensor | None]] = [
        {"channels": made.channels[:-1]},
        {"channels": swapped},
        {"channels": made.channels.int()},
        {"channels": made.channels + 1},
        {"importance": made.importance[..., :-1]},
        {"importance": made.importance.double()},
        {"importance": spoilt_importance},
        {"importance": made.importance[0]},
        {"key_mean": made.key_mean[:, :1]},
        {"key_mean": made.key_mean * torch.nan},
        {"key_mean": None},
        {"key_factor": made.key_factor * 0},
        {"key_factor": None},
        {"extra": torch.zeros(1)},
        {"code_words": None},
        {"code_mean": made.codes.mean[1:]},
        {"code_turn": made.codes.turn * torch.nan},
        {"code_basis": made.codes.basis.double()},
        {"code_words": made.codes.words[..., :2]},
        {"label_mass": mass_of(made)[1:]},
        {"label_mass": mass_of(made)[:, 1:]},
        {"label_mass": mass_of(made).double()},
        {"label_mass": mass_of(made) * torch.nan},
        {"label_mass": mass_of(made) - 0.5},
    ]
    for case in cases:
        assert "is a damaged calibration" in refused(rewritten(made, path, **case)), case
    for metadata in ({"version": "one"}, {"version": ""}, {"tokens": "-3"}, {"tokens": "9" * 5000}):
        assert "is a damaged calibration" in refused(rewritten(made, path, metadata)), metadata
