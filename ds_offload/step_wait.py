"""The host's wait for a decode step."""

from __future__ import annotations

import time
from typing import Protocol

# Of the time that the last step took the host sleeps so much; a step that is a quarter faster is noticed late.
_ASLEEP = 0.75


class Event(Protocol):
    """What a `torch.cuda.Event` is to the wait."""

    def record(self) -> None:
        """Mark what the stream has been given so far."""
        ...

    def query(self) -> bool:
        """Whether all of it is done."""
        ...

    def synchronize(self) -> None:
        """Return when it is."""
        ...


class StepWait:
    """Waits for steps of about the same length without a core of its own.

    A thread that the driver wakes comes up to a millisecond late, which is a tenth of a step, and one that polls
    takes a whole core. So the host sleeps for most of what the last step took, and polls for the rest.

    Args:
        event: Whose `synchronize` puts the thread to sleep; for steps that have no length yet.
    """

    def __init__(self, event: Event) -> None:
        self._event = event
        self._last: float | None = None

    def wait(self, started: float | None) -> None:
        """Wait for all that the current stream was given.

        Args:
            started: When the step began, by `time.perf_counter`; None for a step unlike the others.
        """
        self._event.record()
        if started is None or self._last is None:
            self._event.synchronize()
        else:
            time.sleep(max(0.0, started + _ASLEEP * self._last - time.perf_counter()))
            while not self._event.query():
                # Lets other threads run.
                time.sleep(0)
        if started is not None:
            self._last = time.perf_counter() - started
