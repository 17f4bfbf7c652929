"""A Chrome trace of a few decode steps: what every stream does, and when."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from ds_offload.errors import InputError
from ds_offload.given_path import given_path
from ds_offload.notices import notice, warn

# The first steps compile kernels and capture the graph; the profiler itself starts up in the next.
SKIPPED_STEPS = 3
TRACED_STEPS = 4
# The first token comes from the prompt, and a trace has at least one step.
LEAST_TOKENS = SKIPPED_STEPS + 2
# A trace's events begin behind a few lines for each GPU.
_TRACE_HEAD = 2**20


class StepTrace:
    """Records decode steps after the first few into a file for chrome://tracing or Perfetto; a context manager.

    On CUDA the trace holds the kernels of every stream, so that copies of rows beside
    computation can be seen; on a CPU, torch's operations. Tracing slows the steps it sees.

    Args:
        path: The file; None records nothing.
        device: Where the steps run.
        tokens: New tokens at most.

    Raises:
        InputError: As `check_trace`, or `path` is no path.
    """

    def __init__(self, path: str | Path | None, device: torch.device, tokens: int) -> None:
        self._path = given_path(path, "trace") if path is not None else None
        self._profile: profile | None = None
        self._written = False
        if self._path is None:
            return
        check_trace(self._path, tokens)
        activities = [ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU]
        steps = schedule(wait=SKIPPED_STEPS - 1, warmup=1, active=TRACED_STEPS, repeat=1)
        self._profile = profile(activities=activities, schedule=steps, on_trace_ready=self._write)

    def __enter__(self) -> StepTrace:
        if self._profile is not None:
            self._profile.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self._profile is None:
            return
        self._profile.__exit__(kind, error, where)
        if kind is None and not self._written:
            notice(f"no trace was written: it begins at token {LEAST_TOKENS}, and the answer ended before it")

    def step(self) -> None:
        """One decode step has ended."""
        if self._profile is not None:
            self._profile.step()

    def _write(self, recorded: profile) -> None:
        assert self._path is not None
        self._written = True
        try:
            # The profiler tells nobody that it could not write.
            with tempfile.TemporaryDirectory() as folder:
                made = Path(folder) / "trace.json"
                recorded.export_chrome_trace(str(made))
                shutil.copyfile(made, self._path)
        except OSError as error:
            warn(f"the trace was not written to {self._path}: {error.strerror}; the answer is not changed by that")
            return
        notice(f"trace of {TRACED_STEPS} decode steps at most written to {self._path}")


def check_trace(path: Path, tokens: int) -> None:
    """Refuse a trace file that cannot be written, or of an answer of too few tokens.

    Raises:
        InputError: Its folder does not exist, it is a folder, it may not be written, it is a file of another
            kind, or there is nothing to trace.
    """
    if tokens < LEAST_TOKENS:
        raise InputError(
            f"trace={path} begins at the answer's token {LEAST_TOKENS}, and max_new_tokens={tokens} ends it before; "
            f"set --max-new-tokens {LEAST_TOKENS + TRACED_STEPS - 1} or more"
        )
    if path.is_dir() or not path.parent.is_dir():
        reason = "is a folder" if path.is_dir() else f"is in {path.parent}, which is no folder"
        raise InputError(f"trace={path} {reason}; give the name of a file in a folder that exists")
    there = path.exists() or path.is_symlink()
    if path.is_fifo() or _is_standard_output(path):
        raise InputError(f"trace={path} is a pipe, or where the answer goes; give the name of a file")
    try:
        if path.is_file() and not _is_trace(path):
            raise InputError(f"trace={path} is there and is no trace, so it is not replaced; give another file")
        with path.open("ab"):
            pass
        if not there:
            path.unlink()
    except OSError as error:
        raise InputError(f"cannot write to trace={path}: {error.strerror}; give another file") from error


def _is_standard_output(path: Path) -> bool:
    try:
        return path.is_file() and os.path.samestat(path.stat(), os.fstat(1))
    except OSError:
        return False


def _is_trace(path: Path) -> bool:
    """Whether a file is a Chrome trace by how it begins; an empty one is."""
    with path.open("rb") as file:
        start = file.read(_TRACE_HEAD)
    return not start or (start.lstrip().startswith(b"{") and b'"traceEvents"' in start)
