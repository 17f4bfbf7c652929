"""The prompt of a request: a chat's messages, or a text or token ids to go on from."""

from __future__ import annotations

from typing import Any

from ds_offload.server.api_error import ApiError

_COMPLETION = "one text, or one list of token ids"


def read_messages(messages: Any) -> list[dict[str, str]]:
    """Messages with a role and a text each; a text in parts is joined by new lines.

    Raises:
        ApiError: 400, naming the message.
    """
    if not isinstance(messages, list) or not messages:
        raise ApiError(400, "messages must be a list of at least one message", "messages")
    return [_message(entry, f"messages[{number}]") for number, entry in enumerate(messages)]


def _message(entry: Any, where: str) -> dict[str, str]:
    if not isinstance(entry, dict):
        raise ApiError(400, f"{where} must be an object such as {{'role': 'user', 'content': 'Hello'}}", "messages")
    for name, value in entry.items():
        # Answers of some clients come back with all their fields, empty ones too.
        if name not in ("role", "content") and value not in (None, [], {}):
            raise ApiError(400, f"{where} has {name!r:.60}, which is not supported; leave it out", "messages")
    role, content = entry.get("role"), entry.get("content")
    if not isinstance(role, str) or not role or not role.isprintable():
        raise ApiError(400, f"{where} has no role; give 'system', 'user' or 'assistant'", "messages")
    if isinstance(content, list):
        content = "\n".join(_text_part(part, where) for part in content)
    if not isinstance(content, str):
        raise ApiError(400, f"{where} has no content; give a text", "messages")
    return {"role": role, "content": content}


def _text_part(part: Any, where: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, dict) else part
    raise ApiError(400, f"{where} has a part {kind!r:.60}; only parts of type 'text' are supported", "messages")


def read_completion_prompt(prompt: Any) -> str | list[int]:
    """One text or one list of token ids, also as the only entry of a list.

    Raises:
        ApiError: 400: several prompts, none, or something else.
    """
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        if len(prompt) > 1:
            raise ApiError(400, f"prompt has {len(prompt)} prompts; give one a request", "prompt", "unsupported")
        prompt = prompt[0]
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, list) or not all(
        isinstance(token, int) and not isinstance(token, bool) for token in prompt
    ):
        raise ApiError(400, f"prompt must be {_COMPLETION}", "prompt")
    return prompt
