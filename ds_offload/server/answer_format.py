"""An answer in the shapes of OpenAI's API: one JSON object, or the chunks of a stream."""

from __future__ import annotations

import json
import time
import uuid
from typing import Any

from ds_offload.generation import GenerationOutput

STREAM_END = "data: [DONE]\n\n"


def usage(output: GenerationOutput, cached_tokens: int) -> dict[str, Any]:
    """Tokens of prompt and answer; `cached_tokens` of the prompt's were there already."""
    new = len(output.token_ids)
    return {
        "prompt_tokens": output.prompt_tokens,
        "completion_tokens": new,
        "total_tokens": output.prompt_tokens + new,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def event(content: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(content)}\n\n"


class AnswerFormat:
    """The frame of one answer: its id, its time, and how its endpoint puts a text."""

    def __init__(self, chat: bool, model: str, include_usage: bool) -> None:
        self._chat = chat
        self._include_usage = include_usage
        kind = "chat.completion" if chat else "text_completion"
        self._stream_kind = f"{kind}.chunk" if chat else kind
        self._frame = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, output: GenerationOutput, cached_tokens: int) -> dict[str, Any]:
        """The answer as one object."""
        text = {"message": {"role": "assistant", "content": output.text}} if self._chat else {"text": output.text}
        choice = {"index": 0, **text, "logprobs": None, "finish_reason": output.finish_reason}
        return {**self._frame, "choices": [choice], "usage": usage(output, cached_tokens)}

    def opening(self) -> str:
        """The event in front of a chat's first text; nothing for other completions."""
        return self._chunk({"delta": {"role": "assistant", "content": ""}}) if self._chat else ""

    def piece(self, text: str) -> str:
        """The event of a piece of text."""
        return self._chunk({"delta": {"content": text}} if self._chat else {"text": text})

    def closing(self, output: GenerationOutput, cached_tokens: int) -> str:
        """The events behind the last text."""
        events = self._chunk({"delta": {}} if self._chat else {"text": ""}, output.finish_reason)
        if self._include_usage:
            frame = self._frame | {"object": self._stream_kind}
            events += event({**frame, "choices": [], "usage": usage(output, cached_tokens)})
        return events + STREAM_END

    def _chunk(self, text: dict[str, Any], finish_reason: str | None = None) -> str:
        choice = {"index": 0, **text, "logprobs": None, "finish_reason": finish_reason}
        counted = {"usage": None} if self._include_usage else {}
        return event({**self._frame, "object": self._stream_kind, "choices": [choice], **counted})
