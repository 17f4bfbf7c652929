"""`ds-offload serve`: an OpenAI-compatible HTTP server over one model."""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import TYPE_CHECKING, Annotated

import typer

from ds_offload.cli.config_options import config_options
from ds_offload.cli.option_groups import ModelOptions, model_options
from ds_offload.cli.progress import ProgressReport
from ds_offload.config import OffloadConfig
from ds_offload.errors import InputError
from ds_offload.notices import notice

if TYPE_CHECKING:
    import socket

    from ds_offload.preparation import PreparedModel

_NEEDED = ("fastapi", "uvicorn")


@config_options
@model_options
def serve(
    model: ModelOptions,
    config: OffloadConfig,
    host: Annotated[str, typer.Option("--host", metavar="HOST", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", metavar="PORT", help="Port to listen on; 0 is any free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            "--api-key", metavar="KEY", envvar="DS_OFFLOAD_API_KEY", help="What clients must send. Default: nothing."
        ),
    ] = None,
    served_model_name: Annotated[
        str | None,
        typer.Option("--served-model-name", metavar="NAME", help="What clients call the model. Default: as --model."),
    ] = None,
    max_queue: Annotated[
        int, typer.Option("--max-queue", metavar="N", help="Requests that may wait behind the running one.")
    ] = 16,
    keep_sessions: Annotated[
        int, typer.Option("--keep-sessions", metavar="N", help="Conversations that stay read; 0 keeps none.")
    ] = 1,
) -> None:
    """Answer requests over HTTP as OpenAI's API does; see docs/serving.md."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"serve needs {' and '.join(missing)}, not installed; run: pip install {' '.join(_NEEDED)}")
    for name, number in (("--max-queue", max_queue), ("--keep-sessions", keep_sessions)):
        if number < 0:
            raise InputError(f"{name} {number} must be 0 or more")
    for name, text in (("--api-key", api_key), ("--served-model-name", served_model_name)):
        if text is not None and not text.strip():
            raise InputError(f"{name} is empty; give one, or leave it out")
    from ds_offload.server.address import bind

    with bind(host, port) as bound:
        prepared = _prepare(model, config, keep_sessions)
        _serve(prepared, bound, api_key, served_model_name or model.name, max_queue, keep_sessions)


def _prepare(model: ModelOptions, config: OffloadConfig, keep_sessions: int) -> PreparedModel:
    """The model, checked with the memory of all sessions that are kept; what was left open is said."""
    from ds_offload.memory_check import check_memory, settle_config
    from ds_offload.preparation import PreparedModel, room_of

    prepared = PreparedModel.find(**dataclasses.asdict(model), config=config)
    if prepared.tokenizer is None:
        raise InputError(f"serve needs a tokenizer, and {model.name} has none; put tokenizer.json into its folder")
    sessions, room = max(1, keep_sessions), room_of(prepared.config)
    asked = prepared.source, prepared.config, prepared.device, [max(1, room - 1)] * sessions, [room] * sessions
    check_memory(*asked, continued=True)
    if sessions > 1:
        # Chosen for all at once: the first would take what is there, and leave none to the next.
        prepared = dataclasses.replace(prepared, config=settle_config(*asked, continued=True))
    for line in prepared.announcements:
        notice(line)
    return dataclasses.replace(prepared, announcements=())


def _serve(
    prepared: PreparedModel, bound: socket.socket, api_key: str | None, name: str, max_queue: int, keep_sessions: int
) -> None:
    """Load the weights, and answer until a signal.

    Raises:
        RuntimeError: The device stopped working.
    """
    from ds_offload.generator import OffloadedGenerator
    from ds_offload.server.answer_queue import AnswerQueue
    from ds_offload.server.app import Endpoints
    from ds_offload.server.http_server import HttpServer
    from ds_offload.server.kept_sessions import KeptSessions
    from ds_offload.server.served_model import ServedModel

    with OffloadedGenerator.from_prepared(prepared) as generator:
        # Before it is said to be ready: the first answer would wait for it.
        generator.calibrated([])
        sessions = KeptSessions(generator, keep_sessions, lambda: ProgressReport(phases=("prefill",)))
        with AnswerQueue(sessions, max_queue) as queue:
            endpoints = Endpoints(ServedModel(name, prepared), queue, api_key)
            server = HttpServer(endpoints.app(), queue, name)
            queue.on_broken = lambda: setattr(server, "should_exit", True)
            server.run(sockets=[bound])
            if queue.broken:
                raise RuntimeError("the device stopped working; start the server again")
    notice("ended")
