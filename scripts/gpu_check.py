"""Runs `ds-offload run` on a GPU over long texts and prints time, traffic and memory as a table."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import torch

from ds_offload.loading import find_model, load_tokenizer

NEW_TOKENS = 32


def run(text: str, *arguments: str) -> dict:
    """One `ds-offload run --json` over `text`; its JSON object."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        command = [sys.executable, "-m", "ds_offload", "run", "--prompt-file", file.name, "--json"]
        command += ["--max-new-tokens", str(NEW_TOKENS), *arguments]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"gpu_check: {' '.join(command)} ended with status {done.returncode}")
    return json.loads(done.stdout)


def row(name: str, result: dict) -> str:
    """A line of the summary's table."""
    stats = result["stats"]
    cells = [
        name,
        f"{result['prompt_tokens']:,}",
        f"{stats['prefill_s']:.2f}",
        f"{stats['decode_ms_per_token']:.1f}",
        f"{stats['h2d_bytes_per_token'] / 2**20:.2f}",
        f"{stats['hot_set_hit_rate']:.3f}",
        "-" if stats["prefetch_recall"] is None else f"{stats['prefetch_recall']:.3f}",
        f"{stats['gpu_peak_bytes'] / 2**30:.2f}",
        f"{stats['gpu_peak_bytes'] / stats['gpu_planned_bytes']:.3f}",
        f"{stats['host_pinned_bytes'] / 2**30:.2f}",
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smollm2", default="smollm2-135m", help="the default model, or a copy of it")
    parser.add_argument("--summary", type=Path, help="file to write the summary to as well")
    options = parser.parse_args()
    text = files("ds_offload").joinpath("data", "calibration.txt").read_text(encoding="utf-8")
    long_text = (text * (60_000 // len(text) + 1)).encode()[:60_000].decode(errors="ignore")
    lines: list[str] = []

    def say(line: str) -> None:
        # At once: a run that is cut off has still said what it measured.
        print(line, flush=True)
        lines.append(line)

    say(
        f"GPU: {torch.cuda.get_device_name()}; torch {torch.__version__}, transformers {version('transformers')}, "
        f"CUDA {torch.version.cuda}."
    )
    say("")
    say(
        "| run | prompt tokens | prefill s | decode ms/token | MiB over the link per token | hot-set hit rate "
        "| prefetch recall | GPU peak GiB | peak / plan | pinned GiB |"
    )
    say("| --- " * 10 + "|")
    dummy = ("--model", "llama-2-7b", "--load-format", "dummy", "--ctx", "64k")
    for mode in ("exact", "speculative", "off"):
        say(row(f"llama-2-7b shape, random weights, bf16, {mode}", run(long_text, *dummy, "--prefetch", mode)))
    prompt = first_tokens(text * 3, options.smollm2, 8192 - NEW_TOKENS - 1)
    for dtype in ("fp32", "bf16"):
        say(row(f"smollm2-135m, {dtype}, exact", run(prompt, "--model", options.smollm2, "--dtype", dtype)))
    if options.summary:
        options.summary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def first_tokens(text: str, model: str, count: int) -> str:
    """The longest beginning of `text` that the model's tokenizer cuts into at most `count` tokens."""
    tokenizer = load_tokenizer(find_model(model))
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        if len(tokenizer(text[:middle])["input_ids"]) <= count:
            low = middle
        else:
            high = middle - 1
    return text[:low]


if __name__ == "__main__":
    main()
