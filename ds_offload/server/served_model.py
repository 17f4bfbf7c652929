"""The model that is served: its name, and prompts as it takes them."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

from ds_offload.errors import InputError
from ds_offload.notices import notice
from ds_offload.preparation import PreparedModel, room_of
from ds_offload.server.api_error import ApiError


@dataclass(frozen=True)
class ServedModel:
    """A model as its clients see it; any thread may use it.

    Attributes:
        name: What clients call it.
        prepared: Its tokenizer, and how long a prompt may be.
    """

    name: str
    prepared: PreparedModel
    _one_at_a_time: threading.Lock = field(default_factory=threading.Lock)

    @property
    def max_context(self) -> int:
        """Most tokens of prompt and answer together."""
        return room_of(self.prepared.config)

    def encode(self, prompt: Any, sampling: dict[str, Any]) -> list[int]:
        """Token ids of a prompt; where the context leaves less room than `sampling` wants, that is said on stderr.

        Raises:
            ApiError: 400: empty, too long, or refused by the chat template.
        """
        try:
            with self._one_at_a_time:
                ids = self.prepared.encode(prompt)
        except InputError as error:
            raise ApiError(400, str(error), "messages" if _is_chat(prompt) else "prompt") from None
        room, wanted = self.max_context - len(ids), sampling.get("max_new_tokens", 0)
        if wanted > room:
            notice(f"max_context={self.max_context:,} leaves room for {room:,} new tokens, not {wanted:,}")
        return ids


def _is_chat(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], dict)
