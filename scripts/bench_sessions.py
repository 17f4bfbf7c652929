"""Times of a session: reading, saving, loading beside the disk's own speed, and a second question's first token.

`python scripts/bench_sessions.py --model llama-2-7b --load-format dummy --ctx 128k --folder DISK` prints one JSON
object. Files are dropped from the page cache before each reading; times are the median, p20 and p80 of `--repeats`.
`--no-disk` leaves saving and loading out, for a session larger than the disk has room for.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ds_offload import OffloadConfig, OffloadedGenerator
from ds_offload.bench.environment import Environment
from ds_offload.bench.timing import Timing
from ds_offload.config import parse_tokens
from ds_offload.session import Session

QUESTION = 32
_READ_BYTES = 8 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--ctx", default="8k", help="tokens of the document")
    parser.add_argument("--kv-dtype", default="auto", help="how K/V are stored: bf16, int8, int4 or auto")
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="a folder on the disk to measure")
    parser.add_argument("--no-disk", action="store_true", help="neither save nor load: ask the session that was read")
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    tokens = parse_tokens(given.ctx)
    place = Path(given.folder) / f"bench-session-{os.getpid()}"
    config = OffloadConfig(max_context=tokens + 4 * QUESTION, kv_dtype=given.kv_dtype)
    try:
        with OffloadedGenerator.from_pretrained(
            given.model, config=config, load_format=given.load_format, device=given.device
        ) as generator:
            folder = None if given.no_disk else place
            print(json.dumps(measure(generator, tokens, folder, given.repeats), indent=1))
    finally:
        shutil.rmtree(place, ignore_errors=True)


def measure(generator: OffloadedGenerator, tokens: int, place: Path | None, repeats: int) -> dict[str, Any]:
    """All figures of one document; those of the disk where a folder is given."""
    chosen = torch.Generator().manual_seed(0)
    ids = torch.randint(0, generator.loaded.source.shape.vocab_size, (tokens + QUESTION,), generator=chosen).tolist()
    document, question = ids[:tokens], ids[tokens:]
    figures = {
        **dataclasses.asdict(Environment.of(generator.loaded.device)),
        "model": generator.loaded.source.name,
        "kv_dtype": generator.config.kv_dtype,
        "tokens": tokens,
    }
    started = time.perf_counter()
    with generator.prefill(document) as session:
        figures["read_document_s"] = time.perf_counter() - started
        if place is None:
            return {**figures, **question_times(session, question, repeats)}
        save_s = timed(lambda: session.save(place))
        nbytes = session.save(place).nbytes
    disk, load = [], []
    for _ in range(repeats):
        drop(place)
        disk.append(timed(lambda: read_through(place)))
        drop(place)
        load.append(timed(lambda: generator.load_session(place).close()))
    with generator.load_session(place) as session:
        return {
            **figures,
            "bytes": nbytes,
            "save_gb_per_s": nbytes / save_s / 1e9,
            "disk_s": spread(disk),
            "load_s": spread(load),
            "disk_gb_per_s": nbytes / Timing.of(disk).median / 1e9,
            "load_gb_per_s": nbytes / Timing.of(load).median / 1e9,
            "load_share_of_disk": Timing.of(disk).median / Timing.of(load).median,
            **question_times(session, question, repeats),
        }


def question_times(session: Session, question: list[int], repeats: int) -> dict[str, Any]:
    """What a question after the first one takes to its first token, and a fork."""
    session.ask(question, keep=False, max_new_tokens=4)
    asked = [session.ask(question, keep=False, max_new_tokens=1).stats["prefill_s"] for _ in range(repeats)]
    return {
        "second_question_tokens": len(question),
        "second_question_first_token_s": spread(asked),
        "fork_s": timed(lambda: session.fork().close()),
    }


def timed(work: Callable[[], object]) -> float:
    """Seconds that `work` took."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def spread(samples: list[float]) -> dict[str, float]:
    """Median, p20 and p80."""
    timing = Timing.of(samples)
    return {"median": timing.median, "p20": timing.p20, "p80": timing.p80}


def drop(folder: Path) -> None:
    """Have the next reading come from the disk."""
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_through(folder: Path) -> None:
    """Read every file from its beginning to its end, one after the other."""
    buffer = bytearray(_READ_BYTES)
    for path in sorted(folder.iterdir()):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


if __name__ == "__main__":
    main()
