"""Requests, field by field: taken over, or refused with 400 and one line."""

from __future__ import annotations

from typing import Any

import pytest

from ds_offload.server.answer_request import AnswerRequest
from ds_offload.server.api_error import ApiError

CHAT = {"messages": [{"role": "user", "content": "Hello"}]}


def test_what_is_taken_over() -> None:
    body = CHAT | {
        "model": "m",
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_completion_tokens": 7,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "seed": 3,
        "stop": ["a", "b"],
    }
    asked = AnswerRequest.read(body, chat=True)
    assert (asked.chat, asked.model, asked.stream, asked.include_usage) == (True, "m", True, True)
    assert asked.prompt == CHAT["messages"]
    drawn = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "stop")
    assert asked.sampling == {"max_new_tokens": 7} | {name: body[name] for name in drawn}


def test_what_is_left_out_is_the_runtimes() -> None:
    asked = AnswerRequest.read({"prompt": "Once", "temperature": None, "max_tokens": None}, chat=False)
    assert (asked.prompt, asked.sampling, asked.model, asked.stream) == ("Once", {}, None, False)


def test_fields_that_change_nothing() -> None:
    body = CHAT | {"user": "me", "n": 1, "tools": [], "tool_choice": "auto", "response_format": {"type": "text"}}
    body |= {"logprobs": False, "presence_penalty": 0.0, "metadata": {"a": "b"}, "logit_bias": None, "top_k": -1}
    assert AnswerRequest.read(body, chat=True).sampling == {"top_k": 0}


def test_an_answer_as_clients_give_it_back() -> None:
    messages = [*CHAT["messages"], {"role": "assistant", "content": "Hi", "tool_calls": None, "annotations": []}]
    asked = AnswerRequest.read({"messages": messages}, chat=True)
    assert asked.prompt == [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]


def test_text_in_parts() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    asked = AnswerRequest.read({"messages": [{"role": "user", "content": parts}]}, chat=True)
    assert asked.prompt == [{"role": "user", "content": "one\ntwo"}]


@pytest.mark.parametrize("prompt", ["a", ["a"], [1, 2], [[1, 2]]])
def test_prompts_of_completions(prompt: Any) -> None:
    assert AnswerRequest.read({"prompt": prompt}, chat=False).prompt == (
        prompt if prompt in ("a", [1, 2]) else prompt[0]
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 2),
        ("n", True),
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("logprobs", True),
        ("logprobs", 0),
        ("top_logprobs", 3),
        ("response_format", {"type": "json_object"}),
        ("presence_penalty", 0.5),
        ("logit_bias", {"5": 1}),
        ("best_of", 3),
        ("store", True),
        ("surprise", 1),
        ("prompt", "a"),
        ("model", 5),
        ("stream", "yes"),
        ("stream_options", {"include_usage": True}),
        ("temperature", "0.5"),
        ("temperature", True),
        ("temperature", -1),
        ("temperature", 10**400),
        ("temperature", float("nan")),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_k", 1.5),
        ("top_k", -2),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("seed", -1),
        ("seed", 1.0),
        ("stop", ""),
        ("stop", [1]),
        ("stop", {"a": 1}),
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("max_tokens", "8"),
        ("max_tokens", 8.0),
        ("max_completion_tokens", 0),
    ],
)
def test_what_is_refused(field: str, value: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ApiError) as refused:
        AnswerRequest.read(CHAT | {field: value}, chat=True)
    assert (refused.value.status, refused.value.param or field) == (400, field)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 250
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "messages",
    [
        "Hello",
        [],
        ["Hello"],
        [{"content": "Hello"}],
        [{"role": "user"}],
        [{"role": "", "content": "Hello"}],
        [{"role": "\ud800", "content": "Hello"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "user", "content": ["Hello"]}],
        [{"role": "user", "content": "Hello", "name": "Ann"}],
        [{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}],
    ],
)
def test_messages_that_are_refused(messages: Any) -> None:
    with pytest.raises(ApiError, match="messages") as refused:
        AnswerRequest.read({"messages": messages}, chat=True)
    assert (refused.value.status, refused.value.param) == (400, "messages")


@pytest.mark.parametrize("prompt", [5, ["a", "b"], [[1], [2]], [1, "a"], [True], {"a": 1}, [[["a"]]]])
def test_prompts_that_are_refused(prompt: Any) -> None:
    with pytest.raises(ApiError) as refused:
        AnswerRequest.read({"prompt": prompt}, chat=False)
    assert (refused.value.status, refused.value.param) == (400, "prompt")


@pytest.mark.parametrize("body", [[], "a", None, 1])
def test_bodies_that_are_no_object(body: Any) -> None:
    with pytest.raises(ApiError, match="JSON object"):
        AnswerRequest.read(body, chat=True)


def test_two_lengths() -> None:
    both = CHAT | {"max_tokens": 4, "max_completion_tokens": 4}
    assert AnswerRequest.read(both, chat=True).sampling == {"max_new_tokens": 4}
    with pytest.raises(ApiError, match="differ"):
        AnswerRequest.read(both | {"max_tokens": 5}, chat=True)
    with pytest.raises(ApiError, match="no field 'max_completion_tokens'"):
        AnswerRequest.read({"prompt": "a", "max_completion_tokens": 4}, chat=False)
