"""A client's request for an answer, read field by field: what is not supported is refused, never passed over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ds_offload.errors import InputError
from ds_offload.sampling import SamplingParams
from ds_offload.server.api_error import ApiError
from ds_offload.server.request_prompt import read_completion_prompt, read_messages

# Fields that change nothing about the answer.
_HARMLESS = {"user", "metadata", "safety_identifier", "prompt_cache_key", "service_tier", "parallel_tool_calls"}
# Fields of features that are not there, at the values that do not ask for them; null never does.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "store": (False,),
}
# Fields that go to the sampler as they are, with the JSON types that they may have.
_SAMPLING: dict[str, tuple[type, ...]] = {
    "temperature": (int, float),
    "top_p": (int, float),
    "min_p": (int, float),
    "repetition_penalty": (int, float),
    "seed": (int,),
}
_READ = {"model", "messages", "prompt", "stream", "stream_options", "top_k", "stop", "max_tokens"}


@dataclass(frozen=True)
class AnswerRequest:
    """What is to be answered, and how.

    Attributes:
        chat: Whether it came to `/v1/chat/completions`.
        model: The name it asks for; None where it has none.
        prompt: As `OffloadedGenerator.generate` takes it.
        sampling: Fields of `SamplingParams` that were given, checked.
        stream: Whether the answer is to come in pieces.
        include_usage: Whether the last piece is to count tokens.
    """

    chat: bool
    model: str | None
    prompt: str | list[dict[str, str]] | list[int]
    sampling: dict[str, Any]
    stream: bool
    include_usage: bool

    @classmethod
    def read(cls, body: Any, chat: bool) -> AnswerRequest:
        """The request of a JSON `body`.

        Raises:
            ApiError: 400 with one line that names the field.
        """
        if not isinstance(body, dict):
            raise ApiError(400, "the body must be one JSON object")
        prompt_field = "messages" if chat else "prompt"
        known = _READ - {"prompt" if chat else "messages"} | ({"max_completion_tokens"} if chat else set())
        given = {name: value for name, value in body.items() if value is not None}
        for name, value in given.items():
            if name in _NEUTRAL and not any(_same(value, neutral) for neutral in _NEUTRAL[name]):
                raise ApiError(400, f"{name}={value!r:.60} is not supported; leave it out", name, "unsupported")
            if name not in known | _HARMLESS | _NEUTRAL.keys() | _SAMPLING.keys():
                raise ApiError(400, f"there is no field {name!r:.60} here; leave it out", name, "unknown_field")
        if prompt_field not in given:
            raise ApiError(400, f"{prompt_field} is missing; give it", prompt_field)
        stream = _boolean(given, "stream", "stream")
        return cls(
            chat,
            _typed(given, "model", (str,), "the name of a model"),
            read_messages(given["messages"]) if chat else read_completion_prompt(given["prompt"]),
            _sampling(given),
            stream,
            _include_usage(given, stream),
        )


def _sampling(given: dict[str, Any]) -> dict[str, Any]:
    wanted = {name: _typed(given, name, kinds, "a number") for name, kinds in _SAMPLING.items() if name in given}
    lengths = {name: given[name] for name in ("max_completion_tokens", "max_tokens") if name in given}
    for field in lengths:
        wanted["max_new_tokens"] = _typed(given, field, (int,), "a whole number of tokens")
        if wanted["max_new_tokens"] < 1:
            raise ApiError(400, f"{field}={wanted['max_new_tokens']} must be at least 1", field)
    if len(set(lengths.values())) > 1:
        raise ApiError(400, "max_tokens and max_completion_tokens differ; give one of them", "max_tokens")
    if "top_k" in given:
        top_k = _typed(given, "top_k", (int,), "a whole number of tokens")
        wanted["top_k"] = 0 if top_k == -1 else top_k
    if "stop" in given:
        wanted["stop"] = given["stop"]
    for name, value in wanted.items():
        _check(name, value, next(iter(lengths)) if name == "max_new_tokens" else name)
    return wanted


def _check(name: str, value: Any, field: str) -> None:
    """Check one value alone, so that the error names its field; drawn, so that no warning says it has no effect."""
    try:
        SamplingParams(**{"temperature": 1.0, name: value})
    except (InputError, OverflowError) as error:
        raise ApiError(400, str(error), field) from None


def _include_usage(given: dict[str, Any], stream: bool) -> bool:
    options = _typed(given, "stream_options", (dict,), 'an object such as {"include_usage": true}')
    if options is None:
        return False
    if not stream:
        raise ApiError(400, "stream_options is for stream=true; leave it out", "stream_options")
    unknown = next((name for name in options if name != "include_usage"), None)
    if unknown is not None:
        raise ApiError(400, f"stream_options has no field {unknown!r:.60} here; leave it out", "stream_options")
    return _boolean(options, "include_usage", "stream_options")


def _boolean(given: dict[str, Any], name: str, param: str) -> bool:
    value = given.get(name)
    if value is not None and not isinstance(value, bool):
        raise ApiError(400, f"{name}={value!r:.60} must be true or false", param)
    return bool(value)


def _typed(given: dict[str, Any], name: str, kinds: tuple[type, ...], needed: str) -> Any:
    """The field's value, None where it was not given; true and false are no numbers."""
    value = given.get(name)
    if value is not None and (not isinstance(value, kinds) or isinstance(value, bool)):
        raise ApiError(400, f"{name}={value!r:.60} must be {needed}", name)
    return value


def _same(value: Any, neutral: Any) -> bool:
    """Whether they are equal, true and 1 being two things."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)
