"""uvicorn with this project's way to end: the running answer is finished, or stopped by a second signal."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
from collections.abc import Iterator
from types import FrameType

import uvicorn
from fastapi import FastAPI

from ds_offload.notices import notice
from ds_offload.server.address import url_of
from ds_offload.server.answer_queue import AnswerQueue

# Behind the last answer, for clients to take what is theirs.
GRACE_S = 5.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class HttpServer(uvicorn.Server):
    """Serves an app until a signal; `run` returns then, the signal having been dealt with.

    Args:
        app: The endpoints.
        queue: Told of the end; its owner closes it behind `run`.
        name: What the ready line calls the model.
    """

    def __init__(self, app: FastAPI, queue: AnswerQueue, name: str) -> None:
        # uvicorn's own lines are left out but for what went wrong.
        config = uvicorn.Config(app, loop="asyncio", lifespan="off", ws="none", log_config=None, access_log=False)
        super().__init__(config)
        self._queue = queue
        self._name = name
        self.should_exit = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, and say where."""
        await super().startup(sockets)
        for bound in sockets or []:
            notice(f"{self._name} is ready at {url_of(bound)}/v1 (Ctrl-C ends)")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End once every client has what is its own; those that do not take it are cut off."""
        cut_off = asyncio.create_task(self._cut_off())
        await super().shutdown(sockets)
        cut_off.cancel()

    async def _cut_off(self) -> None:
        while self._queue.busy:
            await asyncio.sleep(0.1)
        await asyncio.sleep(GRACE_S)
        for connection in list(self.server_state.connections):
            transport = getattr(connection, "transport", None)
            if transport is not None:
                transport.abort()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take Ctrl-C and SIGTERM inside the event loop, where locks may be taken; uvicorn would raise them again."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        before = {number: signal.getsignal(number) for number in _SIGNALS}
        for number in _SIGNALS:
            loop.add_signal_handler(number, self.handle_exit, number, None)
        try:
            yield
        finally:
            for number, handler in before.items():
                loop.remove_signal_handler(number)
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End: at the first signal behind the running answer, at the second at its next token."""
        if self.should_exit:
            self._queue.stop()
        else:
            notice("ending behind the running answer; once more ends that, too" if self._queue.busy else "ending")
            self._queue.drain()
        self.should_exit = True
