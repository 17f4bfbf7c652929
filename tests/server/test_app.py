"""The endpoints over real connections: answers, streams, errors, and clients that leave."""

from __future__ import annotations

import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

for needed in ("fastapi", "httpx", "uvicorn"):
    pytest.importorskip(needed, reason=f"needs {needed}, of the extra [test]")

from serving_case import NAME, Served, serve, turns, wait_for  # noqa: E402

from ds_offload.decode import DecodeLoop  # noqa: E402
from ds_offload.server.answer_queue import Job  # noqa: E402

FIRST, SECOND, THIRD = "How long is a piece of string? " * 12, "And of rope?", "Why?"


def events(text: str) -> list[Any]:
    """The JSON of each server-sent event, and [DONE] as it is."""
    assert text.endswith("\n\n")
    lines = text.removesuffix("\n\n").split("\n\n")
    assert all(line.startswith("data: ") and "\n" not in line for line in lines)
    found = [line.removeprefix("data: ") for line in lines]
    return [entry if entry == "[DONE]" else json.loads(entry) for entry in found]


def error_of(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert list(response.json()) == ["error"]
    error = response.json()["error"]
    assert list(error) == ["message", "type", "param", "code"]
    assert error["message"] and "\n" not in error["message"]
    return dict(error)


class Gate:
    """Holds every answer back behind its first piece until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._opened = threading.Event()
        self.given: list[Any] = []
        give = Job.give

        def held(job: Job, event: Any) -> None:
            self.given.append(event)
            give(job, event)
            if isinstance(event, str) and not self._opened.is_set():
                assert self._opened.wait(30)

        monkeypatch.setattr(Job, "give", held)

    def open(self) -> None:
        self._opened.set()


def test_three_turns_equal_prompts_read_whole(served_model: Path) -> None:
    """Greedily, with a budget of the whole context; what was read is not read again."""
    texts: list[str] = []
    with serve(served_model, token_budget="1/1") as served:
        read = 0
        for question in (FIRST, SECOND, THIRD):
            texts.append(question)
            answer = served.chat(*texts, model=NAME, max_tokens=24).json()
            expected = served.generator.generate(turns(*texts), max_new_tokens=24)
            choice, usage = answer["choices"][0], answer["usage"]
            assert choice["message"] == {"role": "assistant", "content": expected.text}
            assert (choice["index"], choice["finish_reason"]) == (0, expected.finish_reason)
            assert usage["prompt_tokens"] == expected.prompt_tokens
            assert usage["completion_tokens"] == len(expected.token_ids)
            assert usage["total_tokens"] == expected.prompt_tokens + len(expected.token_ids)
            assert usage["prompt_tokens_details"] == {"cached_tokens": read}
            read = expected.prompt_tokens
            texts.append(expected.text)
    assert (answer["object"], answer["model"], answer["id"][:9]) == ("chat.completion", NAME, "chatcmpl-")


def test_a_chat_in_pieces(served_model: Path) -> None:
    with serve(served_model) as served:
        whole = served.chat(FIRST, max_tokens=20).json()
        streamed = served.chat(FIRST, max_tokens=20, stream=True, stream_options={"include_usage": True})
        plain = served.chat(FIRST, max_tokens=20, stream=True)
    assert streamed.headers["content-type"].startswith("text/event-stream")
    *chunks, counted, done = events(streamed.text)
    assert done == "[DONE]"
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in [*chunks, counted]}) == 1
    assert [chunk["usage"] for chunk in chunks] == [None] * len(chunks)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""} and deltas[-1] == {}
    assert "".join(delta["content"] for delta in deltas[1:-1]) == whole["choices"][0]["message"]["content"]
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + [whole["choices"][0]["finish_reason"]]
    assert counted["choices"] == [] and counted["usage"]["completion_tokens"] == 20
    assert counted["usage"]["prompt_tokens_details"]["cached_tokens"] == whole["usage"]["prompt_tokens"] - 1
    assert "usage" not in plain.text


def test_completions(served_model: Path) -> None:
    with serve(served_model) as served:
        expected = served.generator.generate("Once upon a time", max_new_tokens=9)
        ids = served.generator.tokenizer("Once upon a time")["input_ids"]
        for prompt in ("Once upon a time", ids, [ids]):
            answer = served.client.post("/v1/completions", json={"prompt": prompt, "max_tokens": 9}).json()
            assert answer["object"] == "text_completion"
            assert answer["choices"][0]["text"] == expected.text
            assert answer["choices"][0]["finish_reason"] == "length"
        body = {"prompt": "Once upon a time", "max_tokens": 9, "stream": True}
        *chunks, done = events(served.client.post("/v1/completions", json=body).text)
    assert done == "[DONE]"
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == expected.text
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


def test_sampling_and_stop(served_model: Path) -> None:
    with serve(served_model) as served:
        sampling = {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.1, "seed": 5}
        expected = served.generator.generate(turns(FIRST), max_new_tokens=16, **sampling)
        answer = served.chat(FIRST, max_completion_tokens=16, **sampling).json()
        assert answer["choices"][0]["message"]["content"] == expected.text
        greedy = served.generator.generate(turns(FIRST), max_new_tokens=16).text
        end = next(letter for letter in greedy[2:] if letter not in greedy[:2])
        choice = served.chat(FIRST, max_tokens=16, stop=end).json()["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == (greedy.partition(end)[0], "stop")


def test_models_and_health(served_model: Path) -> None:
    with serve(served_model) as served:
        assert served.client.get("/health").json() == {"status": "ok"}
        (entry,) = served.client.get("/v1/models").json()["data"]
    assert (entry["id"], entry["object"], entry["max_model_len"]) == (NAME, "model", 2048)


def test_what_the_caller_does_wrong(served_model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with serve(served_model) as served:
        post = served.client.post
        assert error_of(post("/v1/chat/completions", content=b"{"), 400)["code"] == "invalid_json"
        error_of(post("/v1/chat/completions", content=b"\xff\xfe\xfa"), 400)
        error_of(post("/v1/chat/completions", content=b"[" * 100_000), 400)
        error_of(post("/v1/chat/completions", json=[]), 400)
        assert error_of(served.chat(FIRST, n=2), 400)["param"] == "n"
        assert error_of(served.chat(FIRST, model="gpt-4"), 404)["code"] == "model_not_found"
        assert "no room" in error_of(served.chat("x" * 3000), 400)["message"]
        assert error_of(served.chat("x" * 3000, stream=True), 400)["param"] == "messages"
        assert "white space" in error_of(served.chat(" "), 400)["message"]
        assert "vocabulary" in error_of(post("/v1/completions", json={"prompt": [300]}), 400)["message"]
        error_of(post("/v1/completions", json={"prompt": []}), 400)
        error_of(post("/v1/embeddings", json={}), 404)
        error_of(served.client.get("/v1/chat/completions"), 405)
        assert served.chat(FIRST, max_tokens=2).status_code == 200
    assert "Traceback" not in capfd.readouterr().err


def test_the_key(served_model: Path) -> None:
    with serve(served_model, api_key="secret \u00e9") as served:
        assert served.client.get("/health").status_code == 200
        for header in ({}, {"authorization": "Bearer secret"}, {"authorization": "secret"}):
            assert error_of(served.client.get("/v1/models", headers=header), 401)["code"] == "invalid_api_key"
        assert error_of(served.chat(FIRST), 401)["type"] == "authentication_error"
        right = {"authorization": "Bearer secret \u00e9".encode()}
        assert served.client.get("/v1/models", headers=right).status_code == 200


def sent(served: Served, body: dict[str, Any]) -> socket.socket:
    """A connection over which a chat was asked for, and nothing read."""
    url, content = served.client.base_url, json.dumps(body).encode()
    connection = socket.create_connection((url.host, url.port))
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {len(content)}\r\n\r\n"
    connection.sendall(head.encode() + content)
    return connection


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves(served_model: Path, monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    """The answer ends at the next token, and the next one who waits is answered."""
    gate = Gate(monkeypatch)
    with serve(served_model) as served:
        with sent(served, {"messages": turns(FIRST), "max_tokens": 500, "stream": stream}) as connection:
            if stream:
                assert connection.recv(8) == b"HTTP/1.1"
            wait_for(lambda: len(gate.given) > 0)
            running = served.queue._running
            assert running is not None
        wait_for(lambda: running._cancelled.is_set())
        gate.open()
        wait_for(lambda: served.queue._running is None)
        assert len(gate.given) < 10
        assert served.chat(FIRST, max_tokens=3).json()["usage"]["completion_tokens"] == 3


def test_who_waits_and_leaves_is_not_answered(served_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    with serve(served_model) as served, ThreadPoolExecutor() as pool:
        first = pool.submit(served.chat, FIRST, max_tokens=3)
        wait_for(lambda: len(gate.given) > 0)
        with sent(served, {"messages": turns(SECOND)}):
            wait_for(lambda: len(served.queue._waiting) == 1)
        wait_for(lambda: not served.queue._waiting)
        gate.open()
        assert first.result().status_code == 200


def test_a_full_queue(served_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers come in the order of the requests; whoever is too many is told at once."""
    gate = Gate(monkeypatch)
    with serve(served_model, max_queue=2) as served, ThreadPoolExecutor() as pool:
        asked = [pool.submit(served.chat, FIRST, max_tokens=3)]
        wait_for(lambda: len(gate.given) > 0)
        for waiting in (1, 2):
            asked.append(pool.submit(served.chat, SECOND, max_tokens=3))
            wait_for(lambda waiting=waiting: len(served.queue._waiting) == waiting)
        assert error_of(served.chat(THIRD), 429)["code"] == "queue_full"
        gate.open()
        assert [answer.result().status_code for answer in asked] == [200] * 3


def test_the_end(served_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is being answered is answered to the end, who waits is refused, and so is who comes."""
    gate = Gate(monkeypatch)
    with serve(served_model) as served, ThreadPoolExecutor() as pool:
        first = pool.submit(served.chat, FIRST, max_tokens=5)
        wait_for(lambda: len(gate.given) > 0)
        second = pool.submit(served.chat, SECOND)
        wait_for(lambda: len(served.queue._waiting) == 1)
        served.queue.drain()
        assert error_of(second.result(), 503)["code"] == "shutting_down"
        assert error_of(served.chat(THIRD), 503)["type"] == "server_error"
        gate.open()
        assert first.result().json()["usage"]["completion_tokens"] == 5


def test_the_end_at_once(served_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    with serve(served_model) as served, ThreadPoolExecutor() as pool:
        first = pool.submit(served.chat, FIRST, max_tokens=500)
        wait_for(lambda: len(gate.given) > 0)
        served.queue.stop()
        gate.open()
        assert error_of(first.result(), 503)["code"] == "shutting_down"


def fail(served: Served, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def broken(*arguments: Any, **options: Any) -> Any:
        raise error

    monkeypatch.setattr(served.generator, "prefill", broken)


def test_a_failure_is_told_and_the_server_goes_on(
    served_model: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with serve(served_model) as served:
        with monkeypatch.context() as patch:
            fail(served, patch, RuntimeError("it\nbroke"))
            error = error_of(served.chat(FIRST), 500)
            assert error["message"] == "the answer failed: RuntimeError: it broke"
            assert error_of(served.chat(FIRST, stream=True), 500)["type"] == "server_error"
        assert "an answer failed: RuntimeError: it broke" in capfd.readouterr().err
        assert served.chat(FIRST, max_tokens=2).status_code == 200


def test_a_failure_in_the_middle_of_a_stream(served_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its status is sent; the stream's last event is the error, and no end is claimed."""
    step = DecodeLoop.step

    def broken(loop: DecodeLoop, tokens: list[int], lengths: list[int]) -> Any:
        if lengths[0] == 18:
            raise RuntimeError("it broke")
        return step(loop, tokens, lengths)

    with serve(served_model) as served:
        with monkeypatch.context() as patch:
            patch.setattr(DecodeLoop, "step", broken)
            body = {"prompt": [1] * 10, "stream": True, "max_tokens": 30}
            response = served.client.post("/v1/completions", json=body)
        assert response.status_code == 200
        *chunks, last = events(response.text)
        assert chunks and last["error"]["message"] == "the answer failed: RuntimeError: it broke"
        assert served.sessions._sessions == []
        assert served.chat(FIRST, max_tokens=2).status_code == 200


def test_a_device_that_is_lost_ends_the_server(served_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()
    with serve(served_model) as served:
        served.queue.on_broken = ended.set
        monkeypatch.setattr(served.sessions, "intact", lambda: False)
        fail(served, monkeypatch, RuntimeError("the device is gone"))
        error_of(served.chat(FIRST), 500)
        assert ended.wait(10) and served.queue.broken
        error_of(served.chat(FIRST), 503)
