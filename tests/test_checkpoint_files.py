"""A prefill's checkpoint removes and replaces no file but its own."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tiny_models import random_prompts, save_tiny, tiny_config

import ds_offload.prefill_checkpoint
from ds_offload import InputError, OffloadConfig, OffloadedGenerator
from ds_offload.prefill_checkpoint import check_checkpoint_folder
from ds_offload.sealed_json import seal, unseal

IDS = random_prompts(90)[0]


@pytest.fixture
def gen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> OffloadedGenerator:
    monkeypatch.setattr(ds_offload.prefill_checkpoint, "EVERY_S", 0.0)
    monkeypatch.setenv("DS_OFFLOAD_CACHE", str(tmp_path / "cache"))
    save_tiny(tmp_path / "model", tiny_config("llama", num_hidden_layers=5))
    config = OffloadConfig(max_context=512, sink_tokens=2, recent_tokens=4, token_budget=16, segment_tokens=16)
    return OffloadedGenerator.from_pretrained(str(tmp_path / "model"), config=config, device="cpu")


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_the_folder_of_a_saved_session_is_refused(gen: OffloadedGenerator, tmp_path: Path) -> None:
    folder = tmp_path / "book"
    with gen:
        with gen.prefill(IDS) as session:
            session.save(folder)
        before = content(folder)
        assert len(before) > 5
        message = f"{re.escape(str(folder))} is a saved session; give --checkpoint a folder of its own"
        with pytest.raises(InputError, match=message):
            gen.generate(IDS, max_new_tokens=2, checkpoint=folder)
    with pytest.raises(InputError, match=message):
        check_checkpoint_folder(folder)
    assert content(folder) == before


@pytest.mark.parametrize(
    "name", ["layer-0000.safetensors", "labels-a.safetensors", "window-0001.safetensors", "hidden-states.safetensors"]
)
def test_files_of_such_names_without_a_header_are_refused(gen: OffloadedGenerator, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / name).write_bytes(b"mine")
    message = f"holds {name} and no prefill.json, so it is no checkpoint; give --checkpoint a folder of its own"
    with gen, pytest.raises(InputError, match=message):
        gen.generate(IDS, max_new_tokens=2, checkpoint=folder)
    with pytest.raises(InputError, match=message):
        check_checkpoint_folder(folder)
    assert content(folder) == {name: b"mine"}


def test_files_that_came_later_are_left(gen: OffloadedGenerator, tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    others = {f"{part}-mine.safetensors": b"mine" for part in ("layer", "labels", "window", "hidden")}
    others |= {"layer-0099.safetensors": b"mine", ".layer-0099.safetensors.tmp": b"mine", "notes.txt": b"mine"}

    def come(phase: str, done: int, total: int) -> None:
        for name, data in others.items():
            (folder / name).write_bytes(data)

    with gen:
        gen.generate(IDS, max_new_tokens=2, checkpoint=folder, on_progress=come)
    assert content(folder) == others


def test_a_header_that_names_a_file_elsewhere_is_damaged(gen: OffloadedGenerator, tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "kept", tmp_path / "layer-0000.safetensors"
    elsewhere.write_bytes(b"mine")

    def stop(phase: str, done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with gen:
        with pytest.raises(KeyboardInterrupt):
            gen.generate(IDS, max_new_tokens=2, checkpoint=folder, on_progress=stop)
        header = unseal((folder / "prefill.json").read_bytes())
        for changes in (
            {"stray": [f"../{elsewhere.name}"]},
            {"files": header["files"] | {f"../{elsewhere.name}": {"nbytes": 4, "sha256": ""}}},
        ):
            (folder / "prefill.json").write_bytes(seal(header | changes))
            with pytest.raises(InputError, match="damaged, or of another version"):
                gen.generate(IDS, max_new_tokens=2, checkpoint=folder)
    assert elsewhere.read_bytes() == b"mine"
    assert json.loads((folder / "prefill.json").read_text())["done"] == header["done"]


def test_no_folder_is_none(gen: OffloadedGenerator) -> None:
    with gen, pytest.raises(InputError, match="checkpoint='' is empty; give a path"):
        gen.generate([1, 2, 3], max_new_tokens=1, checkpoint="")


def test_a_batch_has_no_checkpoint(gen: OffloadedGenerator, tmp_path: Path) -> None:
    with gen, pytest.raises(InputError, match="a checkpoint is of one prompt, and 2 were given"):
        gen.generate([IDS, IDS], max_new_tokens=2, checkpoint=tmp_path)
