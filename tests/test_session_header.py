"""What a saved session says of itself: whose it is, of which format, and that it is whole."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_tokenizer import chat_tokenizer
from session_case import DOCUMENT, make
from tiny_models import random_prompts, save_tiny, tiny_config

from ds_offload import InputError, OffloadedGenerator
from ds_offload.errors import LoadError
from ds_offload.sealed_json import seal, unseal
from ds_offload.session_header import SessionHeader, calibration_digest, tokenizer_fingerprint
from ds_offload.session_place import HEADER


def test_codes_are_of_their_calibration(tiny_llama: Path, tmp_path: Path) -> None:
    """A calibration that differs in what keys are divided by alone is another one where K/V are quantised."""
    with make(tiny_llama, kv_dtype="int8") as gen, gen.prefill(DOCUMENT) as session:
        session.save(tmp_path / "book")
        made = gen.calibrated([])
        dataclasses.replace(made, key_factor=made.key_factor * 2).save(tmp_path / "other.safetensors")
    other = make(tiny_llama, kv_dtype="int8", calibration=str(tmp_path / "other.safetensors"))
    with other as gen, pytest.raises(InputError, match="another calibration than"):
        gen.load_session(tmp_path / "book")


def test_a_calibration_is_told_by_all_that_labels_are_made_by(tiny_llama: Path) -> None:
    with make(tiny_llama) as gen:
        gen.prefill(DOCUMENT).close()
        made = gen.calibrated([])
    assert made.codes is not None
    others = [
        dataclasses.replace(made, channels=made.channels.flip(-1)),
        dataclasses.replace(made, key_mean=made.key_mean + 1),
        dataclasses.replace(made, codes=None),
    ]
    digests = {calibration_digest(one, False) for one in (made, *others)}
    assert len(digests) == 4
    rescaled = dataclasses.replace(made, key_factor=made.key_factor * 2)
    assert calibration_digest(rescaled, False) == calibration_digest(made, False)
    assert calibration_digest(rescaled, True) != calibration_digest(made, True)


def test_the_format_before_is_read(tiny_llama: Path, saved_session: Path) -> None:
    content = unseal((saved_session / HEADER).read_bytes())
    del content["identity"]["window"], content["identity"]["chat_template"]
    (saved_session / HEADER).write_bytes(seal(content | {"version": 1}))
    with make(tiny_llama) as gen, gen.load_session(saved_session) as session:
        assert session.token_ids == DOCUMENT


def test_another_model_or_setting_is_refused(tiny_llama: Path, saved_session: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    torch.manual_seed(1)
    save_tiny(other, tiny_config("llama", rope_parameters={"rope_type": "default", "rope_theta": 5e5}))
    refusals: list[tuple[OffloadedGenerator, str]] = [
        (make(other), r"another model \(fingerprint \w{8}, here fingerprint \w{8}\), rope \(.*10000.*, here .*500000"),
        (make(tiny_llama, kv_dtype="bf16"), r"another kv_dtype \(fp32, here bf16\);"),
        (make(tiny_llama, label_bits=4), r"label_bits \(None, here 4\), label_code \(product, here scalar\);"),
        (make(tiny_llama, label_channels=3), r"label_channels \(16, here 3\), label_bits .*label_code"),
        (make(tiny_llama, dense_layers=(1,)), r"dense_layers \(\[\], here \[1\]\);"),
        (make(tiny_llama, max_context=150), r"the session has 150 tokens and max_context=150"),
    ]
    for gen, message in refusals:
        with gen, pytest.raises(InputError, match=message) as error:
            gen.load_session(saved_session)
        assert "\n" not in str(error.value)


def test_another_calibration_is_refused(tiny_llama: Path, saved_session: Path, tmp_path: Path) -> None:
    with make(tiny_llama) as gen:
        gen.generate(random_prompts(50, seed=5)[0], max_new_tokens=1)
        gen.calibrated([]).save(tmp_path / "other.safetensors")
        # A calibration that was found or made gives way to the session's own.
        gen.load_session(saved_session).close()
    other = make(tiny_llama, calibration=str(tmp_path / "other.safetensors"))
    with other as gen, pytest.raises(InputError, match=r"another calibration than .*other\.safetensors"):
        gen.load_session(saved_session)
    with make(tiny_llama, calibration=str(saved_session / "calibration.safetensors")) as gen:
        gen.load_session(saved_session).close()


def test_another_chat_template_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    """Where a question would come behind the beginning that the template of that time has made."""
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    tokenizer = chat_tokenizer()
    tokenizer.save_pretrained(model)
    with make(model) as gen:
        for document, name in (("The cat sat.\n" * 3, "text"), (DOCUMENT, "ids")):
            with gen.prefill(document) as session:
                session.save(tmp_path / name)
    other = shutil.copytree(tiny_llama, tmp_path / "other")
    tokenizer.chat_template = tokenizer.chat_template.replace("user", "human").replace("im_start", "im_end")
    tokenizer.save_pretrained(other)
    with make(other) as gen:
        with pytest.raises(InputError, match=r"another chat_template \(fingerprint \w{8}, here fingerprint \w{8}\);"):
            gen.load_session(tmp_path / "text")
        gen.load_session(tmp_path / "ids").close()


def test_a_newer_format_is_refused(tiny_llama: Path, saved_session: Path) -> None:
    content = json.loads((saved_session / HEADER).read_bytes())
    (saved_session / HEADER).write_text(json.dumps(content | {"version": 4}))
    with (
        make(tiny_llama) as gen,
        pytest.raises(LoadError, match=r"format version 4, and this version .* reads up to 3"),
    ):
        gen.load_session(saved_session)


@pytest.mark.parametrize("content", [b"", b"[]", b"[" * 100_000, b"\xff", b"{}", b'{"format": "ds_offload.session"}'])
def test_what_is_no_header(saved_session: Path, content: bytes) -> None:
    (saved_session / HEADER).write_bytes(content)
    with pytest.raises(LoadError, match=r"session.json is damaged"):
        SessionHeader.read(saved_session)


@pytest.mark.parametrize(
    "changes", [{"stored": 0}, {"stored": 151}, {"files": {"../x": {"nbytes": 1, "sha256": ""}}}, {"token_ids": 5}]
)
def test_a_header_that_is_sealed_and_wrong(saved_session: Path, changes: dict[str, Any]) -> None:
    (saved_session / HEADER).write_bytes(seal(unseal((saved_session / HEADER).read_bytes()) | changes))
    with pytest.raises(LoadError, match=r"session.json is damaged"):
        SessionHeader.read(saved_session)


def test_there_is_none(tiny_llama: Path, tmp_path: Path) -> None:
    with make(tiny_llama) as gen:
        with pytest.raises(LoadError, match=r"there is no session .*nowhere;"):
            gen.load_session(tmp_path / "nowhere")
        with pytest.raises(LoadError, match="holds no session"):
            gen.load_session(tmp_path)


def test_tokenizers_have_fingerprints() -> None:
    class Vocabulary:
        def __init__(self, *words: str) -> None:
            self.words = words

        def get_vocab(self) -> dict[str, int]:
            return {word: number for number, word in enumerate(self.words)}

    assert tokenizer_fingerprint(None) == ""
    assert tokenizer_fingerprint(Vocabulary("a", "b")) == tokenizer_fingerprint(Vocabulary("a", "b"))
    assert tokenizer_fingerprint(Vocabulary("a", "b")) != tokenizer_fingerprint(Vocabulary("b", "a"))
