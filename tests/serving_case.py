"""A tiny model served over HTTP in a thread of the tests' process."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from chat_tokenizer import chat_tokenizer
from tiny_models import VOCAB, save_tiny, tiny_config

from ds_offload import OffloadConfig, OffloadedGenerator
from ds_offload.preparation import PreparedModel
from ds_offload.server.address import bind, url_of
from ds_offload.server.answer_queue import AnswerQueue
from ds_offload.server.app import Endpoints
from ds_offload.server.http_server import HttpServer
from ds_offload.server.kept_sessions import KeptSessions
from ds_offload.server.served_model import ServedModel

NAME = "tiny"
CONTEXT = 2048


@dataclass
class Served:
    """A running server, what answers in it, and a client of it."""

    generator: OffloadedGenerator
    sessions: KeptSessions
    queue: AnswerQueue
    server: HttpServer
    client: httpx.Client

    def chat(self, *texts: str, **fields: Any) -> httpx.Response:
        """Post a chat whose messages are the user's and the assistant's in turn."""
        return self.client.post("/v1/chat/completions", json={"messages": turns(*texts), **fields})


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


def save_chat_model(folder: Path) -> Path:
    """A tiny random Llama with a tokenizer of bytes and a chat template."""
    save_tiny(folder, tiny_config("llama", vocab_size=VOCAB, max_position_embeddings=CONTEXT))
    chat_tokenizer().save_pretrained(folder)
    return folder


def prepare(folder: Path, **changes: Any) -> PreparedModel:
    config = {"max_context": CONTEXT, "sink_tokens": 2, "recent_tokens": 4, "monitor": "off"} | changes
    return PreparedModel.find(str(folder), OffloadConfig(**config), "auto", "cpu", "auto", None)


@contextlib.contextmanager
def serve(
    folder: Path, *, keep: int = 1, max_queue: int = 16, api_key: str | None = None, **changes: Any
) -> Iterator[Served]:
    prepared = prepare(folder, **changes)
    with contextlib.ExitStack() as undo:
        generator = undo.enter_context(OffloadedGenerator.from_prepared(prepared))
        sessions = KeptSessions(generator, keep, lambda: contextlib.nullcontext(lambda *progress: None))
        queue = undo.enter_context(AnswerQueue(sessions, max_queue))
        bound = undo.enter_context(bind("127.0.0.1", 0))
        server = HttpServer(Endpoints(ServedModel(NAME, prepared), queue, api_key).app(), queue, NAME)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
        client = undo.enter_context(httpx.Client(base_url=url_of(bound), timeout=60))
        thread.start()
        wait_for(lambda: server.started)
        try:
            yield Served(generator, sessions, queue, server, client)
        finally:
            queue.stop()
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)
