"""A prefill that was killed goes on from its last finished layer, and no other prefill does."""

from __future__ import annotations

import errno
import gc
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import random_prompts, save_tiny, tiny_config

import ds_offload.kept_parts
import ds_offload.prefill_checkpoint
import ds_offload.tensor_file
from ds_offload import InputError, OffloadConfig, OffloadedGenerator
from ds_offload.cli.main import main
from ds_offload.prefill_checkpoint import CheckpointWriteError

LENGTH, LAYERS, NEW = 90, 5, 8
IDS = random_prompts(LENGTH)[0]


class Stopped(Exception):
    """Ends a prefill where the test wants it."""


@pytest.fixture(autouse=True)
def _every_layer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ds_offload.prefill_checkpoint, "EVERY_S", 0.0)
    monkeypatch.setattr(ds_offload.prefill_checkpoint, "_PART_TOKENS", 31)
    monkeypatch.setattr(ds_offload.kept_parts, "RESTORED_TOKENS", 31)
    monkeypatch.setenv("DS_OFFLOAD_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_tiny(folder, tiny_config("llama", num_hidden_layers=LAYERS))
    return folder


def make(model: Path, device: str = "cpu", **changes: Any) -> OffloadedGenerator:
    config = {"max_context": 512, "sink_tokens": 2, "recent_tokens": 4, "token_budget": 16, "segment_tokens": 16}
    return OffloadedGenerator.from_pretrained(str(model), config=OffloadConfig(**config | changes), device=device)


def stop_after(layers: int, most: int = LENGTH) -> Any:
    def on_progress(phase: str, done: int, total: int) -> None:
        if phase == "prefill" and done >= most * layers // LAYERS > 0:
            raise Stopped

    return on_progress


def interrupt(gen: OffloadedGenerator, folder: Path, layers: int, ids: list[int] = IDS) -> None:
    with pytest.raises(Stopped):
        gen.generate(ids, max_new_tokens=NEW, checkpoint=folder, on_progress=stop_after(layers, len(ids)))


def test_quantised_layers_are_taken_up_with_the_same_labels_only(model: Path, tmp_path: Path) -> None:
    with make(model, kv_dtype="int4") as gen:
        interrupt(gen, tmp_path / "kept", 2)
    refused = pytest.raises(
        InputError, match=r"another caches .*label_code=product.*here label_code=scalar, label_bits=8"
    )
    with make(model, kv_dtype="int4", label_bits=8) as gen, refused:
        gen.generate(IDS, max_new_tokens=NEW, checkpoint=tmp_path / "kept")
    refused = pytest.raises(InputError, match=r"another caches .*dense_layers=\(\).*here .*dense_layers=\(1,\)")
    with make(model, kv_dtype="int4", dense_layers=(1,)) as gen, refused:
        gen.generate(IDS, max_new_tokens=NEW, checkpoint=tmp_path / "kept")


@pytest.mark.parametrize("layers", [1, 2, 4])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dense_layers": (0, 3)},
        {"kv_location": "gpu"},
        {"kv_dtype": "bf16", "label_bits": 8},
        {"kv_dtype": "int8"},
        {"kv_dtype": "int4", "dense_layers": (0, 3), "kv_location": "gpu"},
        {"token_budget": "1/1", "recent_tokens": 100},
    ],
)
def test_a_resumed_prefill_gives_the_same_answer(
    layers: int, changes: dict[str, Any], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "kept" / "here"
    with make(model, **changes) as gen:
        expected = gen.generate(IDS, max_new_tokens=NEW, output_logits=True)
        interrupt(gen, folder, layers)
        names = {file.name for file in folder.iterdir()}
        parts = {layer: ["layer"] for layer in range(layers)}
        if changes.get("kv_dtype") in ("int8", "int4"):
            # What was made of the rows before they were quantised.
            parts |= {n: ["layer", "labels", "window"] for n in parts if n not in changes.get("dense_layers", ())}
        assert names == {"prefill.json", f"hidden-{layers:04d}.safetensors"} | {
            f"{part}-{layer:04d}.safetensors" for layer, kept in parts.items() for part in kept
        }
        seen: list[tuple[str, int, int]] = []
        capsys.readouterr()
        out = gen.generate(
            IDS,
            max_new_tokens=NEW,
            output_logits=True,
            checkpoint=folder,
            on_progress=lambda *event: seen.append(event),
        )
    assert f"resuming the prefill at layer {layers} of {LAYERS} from {folder}" in capsys.readouterr().err
    assert seen[0] == ("prefill", LENGTH * layers // LAYERS, LENGTH)
    assert out.token_ids == expected.token_ids
    assert torch.equal(out.logits, expected.logits)
    assert list(folder.iterdir()) == [], "a complete prefill leaves nothing"


def test_interrupted_again_and_again(model: Path, tmp_path: Path) -> None:
    with make(model) as gen:
        expected = gen.generate(IDS, max_new_tokens=NEW).token_ids
        for layers in (1, 2, 3, 4):
            interrupt(gen, tmp_path / "kept", layers)
        assert gen.generate(IDS, max_new_tokens=NEW, checkpoint=tmp_path / "kept").token_ids == expected


def test_a_streamed_answer_resumes_too(model: Path, tmp_path: Path) -> None:
    with make(model) as gen:
        expected = gen.generate(IDS, max_new_tokens=NEW).text
        interrupt(gen, tmp_path / "kept", 2)
        assert "".join(gen.stream(IDS, max_new_tokens=NEW, checkpoint=tmp_path / "kept")) == expected


def test_files_are_safetensors(model: Path, tmp_path: Path) -> None:
    with make(model) as gen:
        interrupt(gen, tmp_path / "kept", 2)
    assert load_file(tmp_path / "kept" / "layer-0001.safetensors")["rows"].shape == (2, LENGTH, 2, 16)
    assert load_file(tmp_path / "kept" / "hidden-0002.safetensors")["rows"].shape == (LENGTH, 64)


def test_nothing_is_written_more_often_than_that(model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(ds_offload.prefill_checkpoint, "EVERY_S", 3600.0)
    with make(model) as gen:
        interrupt(gen, tmp_path / "kept", 4)
        assert list((tmp_path / "kept").iterdir()) == []


def test_another_prefill_is_refused_and_the_checkpoint_is_left(model: Path, tmp_path: Path) -> None:
    folder, other = tmp_path / "kept", tmp_path / "other"
    torch.manual_seed(1)
    save_tiny(
        other,
        tiny_config("llama", num_hidden_layers=LAYERS, rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
    )
    with make(model) as gen:
        interrupt(gen, folder, 2)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    refusals = [
        (make(model), IDS[:-1], r"another prompt \(90 tokens, here 89 tokens\);"),
        (make(model), [*IDS[:-1], IDS[-1] ^ 1], r"another prompt \(90 tokens, here 90 tokens\);"),
        (make(model, kv_dtype="bf16"), IDS, r"another kv_dtype \(fp32, here bf16\);"),
        (make(other), IDS, r"another model \(fingerprint \w{8}, here \w{8}\), rope \(.*10000.*, here .*500000.*\);"),
    ]
    for gen, ids, message in refusals:
        with gen, pytest.raises(InputError, match=message) as error:
            gen.generate(ids, max_new_tokens=2, checkpoint=folder)
        assert "\n" not in str(error.value) and str(folder) in str(error.value)
        assert "give --checkpoint another folder, or empty this one" in str(error.value)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def kept_in(folder: Path) -> dict[str, bytes]:
    """The files, without what the header says of those that were being written."""
    kept = {file.name: file.read_bytes() for file in folder.iterdir()}
    header = json.loads(kept["prefill.json"])
    return kept | {"prefill.json": json.dumps([header["done"], header["files"]]).encode()}


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("name", ["layer-0001.safetensors", "hidden-0002.safetensors", "prefill.json"])
@pytest.mark.parametrize("damage", [_cut, _flip, Path.unlink])
def test_damage_is_noticed(name: str, damage: Any, model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    with make(model) as gen:
        interrupt(gen, folder, 2)
        damage(folder / name)
        with pytest.raises(InputError, match=re.escape(name)) as error:
            gen.generate(IDS, max_new_tokens=2, checkpoint=folder)
    assert "\n" not in str(error.value)


def test_a_header_of_another_version_is_refused(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    with make(model) as gen:
        interrupt(gen, folder, 1)
        header = folder / "prefill.json"
        for text in ("[]", "{}", json.dumps(json.loads(header.read_text()) | {"version": 1}), ""):
            header.write_text(text)
            with pytest.raises(InputError, match="damaged, or of another version"):
                gen.generate(IDS, max_new_tokens=2, checkpoint=folder)


@pytest.mark.parametrize("failing", ["layer-0002", "hidden-0003", "prefill.json"])
def test_a_full_disk_ends_the_run_and_not_the_checkpoint(
    failing: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "kept"
    with make(model) as gen:
        expected = gen.generate(IDS, max_new_tokens=NEW).token_ids
        interrupt(gen, folder, 2)
        before = kept_in(folder)
        write = ds_offload.tensor_file._write

        def full(file: Any, part: Any) -> None:
            if failing in file.name:
                file.write(part[: len(part) // 2])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            write(file, part)

        with monkeypatch.context() as patched:
            patched.setattr(ds_offload.tensor_file, "_write", full)
            with pytest.raises(
                CheckpointWriteError, match="No space left on device; the checkpoint of 2 layers"
            ) as error:
                gen.generate(IDS, max_new_tokens=NEW, checkpoint=folder)
        assert "\n" not in str(error.value) and failing in str(error.value)
        assert kept_in(folder) == before
        assert gen.generate(IDS, max_new_tokens=NEW, checkpoint=folder).token_ids == expected


def test_from_the_command_line(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Status 1 and one line for a disk that is full, 2 for a folder that is none; both name the folder."""
    common = [
        "run",
        "--model",
        str(model),
        "--device",
        "cpu",
        "--prompt",
        " ".join(map(str, IDS)),
        "--max-new-tokens",
        "4",
    ]
    assert main(common) == 0
    expected = capsys.readouterr().out

    def full(file: Any, part: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(ds_offload.tensor_file, "_write", full)
        assert main([*common, "--checkpoint", str(tmp_path / "kept")]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert "No space left on device; nothing is kept" in line and str(tmp_path / "kept") in line
    assert list((tmp_path / "kept").iterdir()) == []
    file = tmp_path / "file"
    file.write_text("")
    assert main([*common, "--checkpoint", str(file)]) == 2
    assert str(file) in capsys.readouterr().err.splitlines()[-1]
    assert main([*common, "--checkpoint", str(tmp_path / "kept")]) == 0
    assert capsys.readouterr().out == expected


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(dtype: torch.dtype, tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", tiny_config("llama", num_hidden_layers=LAYERS), dtype)
    ids = random_prompts(20_000)[0]
    with make(tmp_path / "model", "cuda", max_context=32_768, token_budget=1000, segment_tokens=1024) as gen:
        expected = gen.generate(ids, max_new_tokens=64).token_ids
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        for layers in (1, 3):
            # What the device has done is known late: the file's name tells how far it was.
            with pytest.raises(Stopped):
                gen.generate(
                    ids, max_new_tokens=2, checkpoint=tmp_path / "kept", on_progress=stop_after(layers, 20_000)
                )
            assert (tmp_path / "kept" / "prefill.json").is_file()
        gc.collect()
        assert torch.cuda.memory_allocated() == before
        assert gen.generate(ids, max_new_tokens=64, checkpoint=tmp_path / "kept").token_ids == expected
