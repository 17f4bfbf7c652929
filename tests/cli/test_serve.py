"""`ds-offload serve` as a process: what it refuses before weights load, and how it ends."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

for needed in ("fastapi", "uvicorn"):
    pytest.importorskip(needed, reason=f"needs {needed}, of the extra [test]")
httpx = pytest.importorskip("httpx", reason="needs httpx, of the extra [test]")

ROOT = Path(__file__).resolve().parents[2]
BODY = {"prompt": "Once upon a time", "max_tokens": 3}


@pytest.fixture(autouse=True)
def never_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the tests' own process nothing may be served: it would not end."""

    def served(*arguments: Any) -> None:
        raise RuntimeError("it was not refused")

    monkeypatch.setattr("ds_offload.cli.serve._serve", served)


@contextlib.contextmanager
def process(*arguments: str, **environment: str) -> Iterator[tuple[Any, str]]:
    """The command, and the address that it says when it is ready; it must have ended at the end."""
    command = [sys.executable, "-m", "ds_offload", "serve", "--device", "cpu", "--port", "0", *arguments]
    environ = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    with subprocess.Popen(command, cwd=ROOT, env=environ, stderr=subprocess.PIPE, text=True) as child:
        try:
            assert child.stderr is not None
            seen = ""
            while (ready := re.search(r"is ready at (http://\S+)/v1", seen)) is None:
                line = child.stderr.readline()
                assert line, f"it ended: {seen}"
                seen += line
            yield child, ready[1]
        finally:
            child.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it(chat_model: str, number: int) -> None:
    with process("--model", chat_model, "--served-model-name", "m") as (child, address):
        answer = httpx.post(f"{address}/v1/completions", json=BODY | {"model": "m"}, timeout=60).json()
        assert answer["usage"]["completion_tokens"] == 3
        child.send_signal(number)
        _, err = child.communicate(timeout=30)
    assert child.returncode == 0
    assert err.splitlines()[-1] == "ds-offload: ended"
    assert "Traceback" not in err and "answered: prompt tokens 16, of them read before 0; new tokens 3 (length)" in err


@pytest.mark.parametrize(("signals", "tokens"), [(1, 400), (2, 15_000)])
def test_a_signal_while_it_answers(chat_model: str, signals: int, tokens: int) -> None:
    """The running answer is finished, or ends at its next token at the second signal."""
    body = BODY | {"max_tokens": tokens, "stream": True}
    with process("--model", chat_model, "--ctx", "16k") as (child, address):
        with httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            child.send_signal(signal.SIGINT)
            assert "ending behind the running answer" in child.stderr.readline()
            if signals == 2:
                child.send_signal(signal.SIGINT)
            rest = "\n".join(lines)
        _, err = child.communicate(timeout=30)
    assert child.returncode == 0
    assert ("[DONE]" in rest, "shutting_down" in rest) == ((True, False) if signals == 1 else (False, True))
    assert err.splitlines()[-1] == "ds-offload: ended" and "Traceback" not in err


def test_a_client_that_takes_nothing_does_not_hold_it_up(chat_model: str) -> None:
    """One that has sent half of its request, and keeps the connection open."""
    with process("--model", chat_model) as (child, address):
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as half:
            half.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{")
            assert httpx.get(f"{address}/health").status_code == 200
            child.send_signal(signal.SIGTERM)
            _, err = child.communicate(timeout=30)
    assert (child.returncode, err.splitlines()[-2:]) == (0, ["ds-offload: ending", "ds-offload: ended"])


def test_the_key_comes_from_the_environment(chat_model: str) -> None:
    with process("--model", chat_model, DS_OFFLOAD_API_KEY="secret") as (_, address):
        assert httpx.get(f"{address}/v1/models").status_code == 401
        assert httpx.get(f"{address}/v1/models", headers={"authorization": "Bearer secret"}).status_code == 200


def test_a_port_in_use(refused: Any, chat_model: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        ended = refused("serve", "--model", chat_model, "--device", "cpu", "--port", port)
    assert f"cannot listen on 127.0.0.1 port {port}: Address already in use; give another --port" in ended.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--host", "no.such.host.invalid"], "--host 'no.such.host.invalid' cannot be found"),
        (["--host", "192.0.2.1"], "give --host an address of this machine"),
        (["--host", "a" * 100], "cannot be found"),
        (["--port", "70000"], "--port 70000 is none"),
        (["--port", "-1"], "--port -1 is none"),
        (["--max-queue", "-1"], "--max-queue -1 must be 0 or more"),
        (["--keep-sessions", "-1"], "--keep-sessions -1 must be 0 or more"),
        (["--api-key", ""], "--api-key is empty"),
        (["--served-model-name", " "], "--served-model-name is empty"),
        (["--host-memory", "1MiB"], "of host memory"),
    ],
)
def test_what_is_refused(refused: Any, chat_model: str, arguments: list[str], said: str) -> None:
    assert said in refused("serve", "--model", chat_model, "--device", "cpu", "--port", "0", *arguments).err


def test_a_model_without_a_tokenizer(refused: Any, ids_model: str) -> None:
    assert "serve needs a tokenizer" in refused("serve", "--model", ids_model, "--device", "cpu", "--port", "0").err


def test_memory_is_that_of_all_kept_sessions(refused: Any, chat_model: str) -> None:
    arguments = (
        "--model",
        chat_model,
        "--device",
        "cpu",
        "--port",
        "0",
        "--host-memory",
        "64MiB",
        "--kv-dtype",
        "fp32",
    )
    ended = refused("serve", *arguments, "--keep-sessions", "100")
    assert "51,200 tokens need" in ended.err


def test_without_its_packages(refused: Any, chat_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    ended = refused("serve", "--model", chat_model)
    assert "serve needs fastapi and uvicorn, not installed; run: pip install fastapi uvicorn" in ended.err
