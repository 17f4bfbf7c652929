"""Token ids of one answer to pieces of text, as they come."""

from __future__ import annotations

import re
from typing import Any

from ds_offload.errors import InputError

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class TextStream:
    """Turns the tokens of one sequence into text that never has to be taken back.

    The pieces of `push` and `finish` joined are the tokenizer's own text of all tokens
    (special tokens skipped), or that text up to the first stop string. Only a short
    suffix of the tokens is decoded at each step: a token changes the text of the few
    before it, never more. Held back are a character whose bytes are not all there and
    text that may be the start of a stop string.

    Args:
        tokenizer: The model's tokenizer; None makes the text the ids, separated by spaces.
        stop: Strings that end the text. The one that is complete first counts (of two
            that end at the same place, the one that starts first).

    Raises:
        InputError: Stop strings without a tokenizer.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...] = ()) -> None:
        if tokenizer is None and stop:
            raise InputError(f"stop={stop[0]!r} needs a tokenizer, and this model's folder has none; leave stop out")
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = stop
        self._window: list[int] = []  # the last tokens: `_anchor` of them are done with, the rest may still change
        self._anchor = 0
        self._anchor_length = 0  # characters of the text of the window's first `_anchor` tokens
        self._known = 0  # characters of the window's text that were released
        self._held = ""  # released text that may be the start of a stop string
        self._pieces: list[str] = []
        self._options: dict[str, Any] = {}
        self._skipped: frozenset[int] = frozenset()
        if hasattr(tokenizer, "added_tokens_decoder"):
            self._options = {"clean_up_tokenization_spaces": False}
            if tokenizer.is_fast:
                # decode() drops these before anything else, so never taking them in changes nothing.
                special = (token for token, added in tokenizer.added_tokens_decoder.items() if added.special)
                self._skipped = frozenset(special)

    @property
    def text(self) -> str:
        """Everything given out so far."""
        return "".join(self._pieces)

    def push(self, token_id: int) -> str:
        """Take the next token; the text that is final now (often empty, nothing after a stop string)."""
        if self.stopped or token_id in self._skipped:
            return ""
        if self._tokenizer is None:
            return self._give(f" {token_id}" if self._pieces else str(token_id))
        self._window.append(token_id)
        # One wrong byte spoils the text of the whole run of byte tokens it stands in, so a run
        # waits for its end, unless it completes a stop string: then nothing can follow.
        in_byte_run = self._is_byte_token(token_id)
        if in_byte_run and not self._stop:
            return ""
        text = self._decode()
        complete = not text.endswith("\ufffd")
        new = text[self._known :] if complete else text[self._known : -1]
        if in_byte_run and self._stop_start(self._held + new) is None:
            return ""
        self._known += len(new)
        if complete and len(text) > self._anchor_length:
            # The tokens since the anchor are the context of what follows: they bear text, so a
            # decoder that strips the first space of all has stripped theirs.
            del self._window[: self._anchor]
            self._anchor = len(self._window)
            self._anchor_length = self._known = len(self._decode())
        return self._release(new)

    def finish(self) -> str:
        """The text that was held back; to be called once, after the last token."""
        if self.stopped:
            return ""
        rest = self._release(self._decode()[self._known :]) if self._window else ""
        held, self._held = self._held, ""
        return rest + self._give(held)

    def _decode(self) -> str:
        return self._tokenizer.decode(self._window, skip_special_tokens=True, **self._options)

    def _is_byte_token(self, token_id: int) -> bool:
        if not self._options:
            return False
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        return token is not None and _BYTE_TOKEN.fullmatch(token) is not None

    def _stop_start(self, text: str) -> int | None:
        """Where the stop string that is complete first starts in `text`."""
        found = [(start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0]
        return min(found)[1] if found else None

    def _release(self, new: str) -> str:
        """Give out `new` after what was held back, up to a stop string or a possible start of one."""
        text = self._held + new
        end = self._stop_start(text)
        if end is not None:
            self.stopped = True
            self._held = ""
            return self._give(text[:end])
        longest = max(map(len, self._stop), default=1)
        starts = range(max(0, len(text) - longest + 1), len(text))
        end = next((i for i in starts if any(stop.startswith(text[i:]) for stop in self._stop)), len(text))
        self._held = text[end:]
        return self._give(text[:end])

    def _give(self, piece: str) -> str:
        if piece:
            self._pieces.append(piece)
        return piece
