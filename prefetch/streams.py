"""CUDA streams of the decode loop and the events by which one hands over to another."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

StreamName = Literal["compute", "prefetch", "writer"]


@dataclass(frozen=True)
class Faults:
    """What the tests of the hand-overs do to them; empty in normal use.

    Attributes:
        delay: GPU cycles to sleep before a producer's work, by hand-over.
        drop: Hand-overs whose readers do not wait.
    """

    delay: Mapping[str, int] = field(default_factory=dict)
    drop: frozenset[str] = frozenset()


class Streams:
    """The compute, prefetch and writer streams of one decode, and their hand-overs.

    A hand-over is named by what is handed over and the layer or buffer it belongs to:

    - `hidden`: a layer's input; made on compute, read by the prediction on prefetch.
    - `selection`: predicted tokens; made on prefetch, read on compute.
    - `gather`: rows of the predicted tokens; made on prefetch, read on compute.
    - `admitted`: a layer's selection, its scores and its slots; made on compute, read by the
      look-ahead on prefetch.
    - `look_ahead`: rows for the next step; made on prefetch, read in the next step.
    - `rows`: K/V of a layer's new token; made on compute, read by the writer.
    - `label`: its product code; made by the writer, read in later steps.
    - `host_write`: its rows in the host's store; made by the writer, read in later steps.
    - `kv`: a prompt layer's K/V; made on compute, in front of what prefetch reads back for it.
    - `leaving`: the same when they have been attended to; made on compute, read by the writer.
    - `prompt_rows`: a prompt layer's rows in the store; made by the writer, waited for
      before the staging buffer is filled again. Those of the last layers are waited for by `join`.
    - `stored`: a block of rows read back from the store; made on prefetch, attended to on compute.
    - `attended`: the same block's attention; made on compute, waited for before the
      prefetch stream fills the buffer again.

    A step, and a prefill, begins behind everything that was given to any stream before (`join`), so
    nothing else is handed over from step to step.

    The producer calls `producing` around its work, which records the event behind it;
    every reader on another stream calls `wait` first. On a CPU everything runs in
    order and both do nothing.
    """

    def __init__(self, device: torch.device, faults: Faults | None = None) -> None:
        self._cuda = device.type == "cuda"
        self._faults = faults or Faults()
        self._events: dict[tuple[str, int], torch.cuda.Event] = {}
        self._streams: dict[str, torch.cuda.Stream] = {}
        self._held: list[Tensor] = []
        if self._cuda:
            prefetch, writer, _ = _side_streams(device)
            self._streams = {"compute": torch.cuda.current_stream(device), "prefetch": prefetch, "writer": writer}

    def on(self, name: StreamName) -> Any:
        """Context in which work goes to the stream `name`."""
        return torch.cuda.stream(self._streams[name]) if self._cuda else nullcontext()

    @contextmanager
    def producing(self, what: str, index: int) -> Iterator[None]:
        """Work whose result is handed over as (`what`, `index`)."""
        if not self._cuda:
            yield
            return
        cycles = self._faults.delay.get(what, 0)
        if cycles:
            torch.cuda._sleep(cycles)
        yield
        event = self._events.setdefault((what, index), torch.cuda.Event())
        event.record()

    def wait(self, what: str, index: int) -> None:
        """Make the current stream wait for the last hand-over (`what`, `index`), if there was one."""
        event = self._events.get((what, index))
        if event is not None and what not in self._faults.drop:
            event.wait()

    def lend(self, tensor: Tensor, name: StreamName) -> Tensor:
        """Tell the allocator that `name` reads a tensor made on another stream."""
        if self._cuda:
            tensor.record_stream(self._streams[name])
        return tensor

    def hold(self, *tensors: Tensor) -> None:
        """Keep tensors of the compute stream that another stream reads, until it has joined."""
        if self._cuda:
            self._held += tensors

    def join(self) -> None:
        """Make the compute stream wait for everything the others were given: the hand-over `step`."""
        if self._cuda and "step" not in self._faults.drop:
            for name in ("prefetch", "writer"):
                self._streams["compute"].wait_stream(self._streams[name])
        self._held.clear()

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """Inside a graph capture: compute is the capturing stream, and the others fork from it and join it.

        Work before the capture is waited for here, since a graph cannot wait for events
        outside it; a replay begins behind everything in front of it on its stream.
        """
        outside = self._streams["compute"]
        self._streams["compute"] = torch.cuda.current_stream(outside.device)
        self._events.clear()
        try:
            yield
            for name in ("prefetch", "writer"):
                with torch.cuda.stream(self._streams[name]):
                    forked = torch.cuda.is_current_stream_capturing()
                if forked:
                    self._streams["compute"].wait_stream(self._streams[name])
        finally:
            self._streams["compute"] = outside
            self._events.clear()


def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream to capture a step's compute on: its kernels go before those of the other two."""
    return _side_streams(device)[2]


@functools.cache
def _side_streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream, torch.cuda.Stream]:
    """The device's prefetch, writer and capture streams, the same for every decode: libraries keep a workspace each."""
    return torch.cuda.Stream(device), torch.cuda.Stream(device), torch.cuda.Stream(device, priority=-1)
