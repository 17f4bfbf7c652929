"""Requests answered one at a time, in the order in which they came, by a thread of their own."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import threading
from collections.abc import Callable
from typing import Any

from ds_offload.errors import InputError, LoadError, MemoryPlanError
from ds_offload.notices import warn
from ds_offload.server.api_error import TOO_MANY, ApiError, closing
from ds_offload.server.kept_sessions import Answer, Cancelled, KeptSessions


class Job:
    """One prompt to answer. What comes of it is put to `events`: pieces of text, then an `Answer` or an `ApiError`.

    Args:
        ids: Token ids of the prompt.
        sampling: Fields of `SamplingParams`.
        loop: The event loop that takes the events.
    """

    def __init__(self, ids: list[int], sampling: dict[str, Any], loop: asyncio.AbstractEventLoop) -> None:
        self.ids = ids
        self.sampling = sampling
        self.events: asyncio.Queue[str | Answer | ApiError] = asyncio.Queue()
        self._loop = loop
        self._cancelled = threading.Event()

    def give(self, event: str | Answer | ApiError) -> None:
        """Put an event, from any thread."""
        # A loop that has ended has nobody who waits.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self.events.put_nowait, event)

    def cancel(self) -> None:
        """Let the answer end at its next token."""
        self._cancelled.set()

    def check(self) -> None:
        """Raise `Cancelled` where nobody waits any more."""
        if self._cancelled.is_set():
            raise Cancelled


class AnswerQueue:
    """Jobs in a row, and the thread that answers them; a context manager, or `close` ends it.

    The thread alone uses the generator and its sessions. The lock guards who waits and who is answered.

    Args:
        sessions: What answers.
        longest: Jobs that may wait beside the one that is answered.

    Attributes:
        broken: Whether the device no longer works, so that no further job can be answered.
        on_broken: Called then, from the thread.
    """

    def __init__(self, sessions: KeptSessions, longest: int) -> None:
        self.broken = False
        self.on_broken: Callable[[], None] | None = None
        self._sessions = sessions
        self._longest = longest
        self._waiting: collections.deque[Job] = collections.deque()
        self._running: Job | None = None
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="answers", daemon=True)
        self._thread.start()

    def __enter__(self) -> AnswerQueue:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def busy(self) -> bool:
        """Whether a job is being answered."""
        return self._running is not None

    def submit(self, job: Job) -> None:
        """Put a job at the end.

        Raises:
            ApiError: 429 where too many wait, 503 where the server is ending.
        """
        with self._changed:
            if self._closing:
                raise closing()
            # The next one is taken in a moment where none is answered.
            if len(self._waiting) >= self._longest + (self._running is None):
                wait = f"{len(self._waiting)} requests are waiting (--max-queue); ask again later"
                raise ApiError(TOO_MANY, wait, code="queue_full")
            self._waiting.append(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Give a job's place up; one that is answered ends at its next token, one that has ended is left alone."""
        job.cancel()
        with self._changed, contextlib.suppress(ValueError):
            self._waiting.remove(job)

    def drain(self) -> None:
        """Refuse whoever waits and whoever comes; the one that is answered goes on."""
        with self._changed:
            self._closing = True
            for job in self._waiting:
                job.give(closing())
            self._waiting.clear()
            self._changed.notify()

    def stop(self) -> None:
        """`drain`, and end the one that is answered at its next token."""
        self.drain()
        with self._changed:
            if self._running is not None:
                self._running.cancel()

    def close(self) -> None:
        """`stop`, wait for the thread, and free the sessions."""
        self.stop()
        self._thread.join()
        self._sessions.close()

    def _work(self) -> None:
        while (job := self._next()) is not None:
            self._answer(job)

    def _next(self) -> Job | None:
        with self._changed:
            self._running = None
            self._changed.wait_for(lambda: self._waiting or self._closing)
            if self._waiting:
                self._running = self._waiting.popleft()
            return self._running

    def _answer(self, job: Job) -> None:
        try:
            job.check()
            job.give(self._sessions.answer(job.ids, job.sampling, job.give, job.check))
        except Cancelled:
            job.give(closing())
        except Exception as error:
            job.give(_failure(error))
            if not isinstance(error, InputError) and not self._sessions.intact():
                self.broken = True
                self.drain()
                if self.on_broken is not None:
                    self.on_broken()


def _failure(error: Exception) -> ApiError:
    """What the client is told; what is not its own mistake is said on stderr, too."""
    if isinstance(error, InputError) and not isinstance(error, LoadError | MemoryPlanError):
        return ApiError(400, str(error))
    reason = " ".join(str(error).split())
    line = reason if isinstance(error, InputError) else f"{type(error).__name__}: {reason}".rstrip(": ")
    warn(f"an answer failed: {line}")
    return ApiError(500, f"the answer failed: {line}")
