"""A JSON object that carries its own checksum."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def seal(content: dict[str, Any]) -> bytes:
    """`content` as JSON, with its SHA-256 as the entry "sha256"."""
    return json.dumps(content | {"sha256": _checksum(content)}, indent=1).encode()


def unseal(data: bytes) -> dict[str, Any]:
    """The content of what `seal` wrote.

    Raises:
        ValueError: It is no JSON object, or was changed.
    """
    try:
        content = json.loads(data)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(content, dict) or content.pop("sha256", None) != _checksum(content):
        raise ValueError("its checksum is another one")
    return content


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
