"""The endpoints: OpenAI's, for one model."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from ds_offload.server.answer_format import AnswerFormat, event
from ds_offload.server.answer_queue import AnswerQueue, Job
from ds_offload.server.answer_request import AnswerRequest
from ds_offload.server.api_error import ApiError
from ds_offload.server.kept_sessions import Answer
from ds_offload.server.served_model import ServedModel


class Endpoints:
    """What each endpoint does.

    Args:
        model: Name, tokenizer and limits.
        queue: Answers the prompts.
        api_key: What clients must send; None where they need none.
    """

    def __init__(self, model: ServedModel, queue: AnswerQueue, api_key: str | None) -> None:
        self._model = model
        self._queue = queue
        self._api_key = api_key
        self._started = int(time.time())

    def app(self) -> FastAPI:
        """The ASGI application."""
        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        app.add_api_route("/health", self.health, methods=["GET"])
        v1 = APIRouter(prefix="/v1", dependencies=[Depends(self.check_key)])
        v1.add_api_route("/models", self.models, methods=["GET"])
        v1.add_api_route("/chat/completions", self.chat, methods=["POST"], response_model=None)
        v1.add_api_route("/completions", self.complete, methods=["POST"], response_model=None)
        app.include_router(v1)
        for kind in (ApiError, HTTPException, ClientDisconnect, Exception):
            app.add_exception_handler(kind, _tell)
        return app

    def check_key(self, request: Request) -> None:
        """Refuse a request without the key; ApiError 401."""
        kind, _, key = request.headers.get("authorization", "").partition(" ")
        right = kind.lower() == "bearer" and secrets.compare_digest(
            key.strip().encode("latin-1"), (self._api_key or "").encode()
        )
        if self._api_key is not None and not right:
            line = "the API key is missing or wrong; send 'Authorization: Bearer KEY'"
            raise ApiError(401, line, code="invalid_api_key")

    async def health(self) -> dict[str, str]:
        """That the server is there."""
        return {"status": "ok"}

    async def models(self) -> dict[str, Any]:
        """The one model, with the most tokens of prompt and answer together."""
        entry = {"id": self._model.name, "object": "model", "created": self._started, "owned_by": "ds-offload"}
        return {"object": "list", "data": [entry | {"max_model_len": self._model.max_context}]}

    async def chat(self, request: Request) -> Response:
        """The answer to a chat's messages."""
        return await self._answer(request, chat=True)

    async def complete(self, request: Request) -> Response:
        """What comes behind a text."""
        return await self._answer(request, chat=False)

    async def _answer(self, request: Request, chat: bool) -> Response:
        asked = AnswerRequest.read(await _json(request), chat)
        if asked.model not in (None, self._model.name):
            line = f"there is no model {asked.model!r:.80}; this server has {self._model.name!r}"
            raise ApiError(404, line, "model", "model_not_found")
        ids = await run_in_threadpool(self._model.encode, asked.prompt, asked.sampling)
        job = Job(ids, asked.sampling, asyncio.get_running_loop())
        self._queue.submit(job)
        format = AnswerFormat(chat, self._model.name, asked.include_usage)
        streaming = False
        try:
            # The status is sent with the first piece, so that it is true.
            found = await _before_leaving(request, job.events.get() if asked.stream else _last(job))
            if found is None:
                return Response(status_code=499)
            if isinstance(found, ApiError):
                raise found
            if asked.stream:
                streaming = True
                return _JobStream(self._queue, job, _events(job, format, found))
            assert isinstance(found, Answer)
            return JSONResponse(format.whole(found.output, found.cached_tokens))
        finally:
            if not streaming:
                self._queue.cancel(job)


class _JobStream(StreamingResponse):
    """A stream of events whose job is given up when it ends, however that comes about."""

    def __init__(self, queue: AnswerQueue, job: Job, events: AsyncIterator[str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._queue = queue
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._queue.cancel(self._job)


async def _events(job: Job, format: AnswerFormat, found: str | Answer | ApiError) -> AsyncIterator[str]:
    yield format.opening()
    while isinstance(found, str):
        if found:
            yield format.piece(found)
        found = await job.events.get()
    # Behind the first piece an error has no status of its own.
    yield event(found.body) if isinstance(found, ApiError) else format.closing(found.output, found.cached_tokens)


async def _last(job: Job) -> Answer | ApiError:
    while isinstance(found := await job.events.get(), str):
        pass
    return found


async def _before_leaving(request: Request, wanted: Any) -> Any:
    """What `wanted` gives; None where the client leaves before."""
    tasks = [asyncio.ensure_future(wanted), asyncio.ensure_future(_left(request))]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _json(request: Request) -> Any:
    try:
        return json.loads(await request.body())
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from None


async def _tell(request: Request, error: Exception) -> Response:
    if isinstance(error, ApiError):
        return JSONResponse(error.body, error.status)
    if isinstance(error, HTTPException):
        what = f"{request.method} {request.url.path}"
        line = f"there is no {what} here" if error.status_code == 404 else f"{what}: {error.detail}"
        return JSONResponse(ApiError(error.status_code, line).body, error.status_code, error.headers)
    if isinstance(error, ClientDisconnect):
        return Response(status_code=499)
    return JSONResponse(ApiError(500, f"the server failed: {type(error).__name__}").body, 500)
