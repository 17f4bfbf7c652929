"""Text of any length in tokens to hide facts in: the sentences of a document, shuffled, again and again."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from importlib import resources

from ds_offload.errors import InputError

Counter = Callable[[str], int]

SHIPPED_FILLER = "jargon_file.txt"


def shipped_filler() -> str:
    """The document that comes with the package."""
    return resources.files("ds_offload").joinpath("data", SHIPPED_FILLER).read_text(encoding="utf-8")


def sentences(text: str) -> list[str]:
    """The text's sentences of at least four words, in order, each on one line.

    Raises:
        InputError: There is none.
    """
    parts = re.split(r"(?<=[.!?])\s+|\n\s*\n", text)
    found = [" ".join(part.split()) for part in parts if len(part.split()) >= 4]
    if not found:
        raise InputError("the filler text has no sentence of four words; give another file with --text")
    return [part if part[-1] in ".!?" else f"{part}." for part in found]


class Haystack:
    """Filler sentences with their tokens counted once.

    Args:
        text: Where the sentences come from.
        count: Tokens of a text.
        avoid: Words that no sentence may contain, so that no answer stands in the filler.

    Raises:
        InputError: No sentence is left.
    """

    def __init__(self, text: str, count: Counter, avoid: tuple[str, ...] = ()) -> None:
        every = sentences(text)
        kept = [part for part in every if not any(word in part for word in avoid)]
        if not kept:
            raise InputError(
                f"every sentence of the filler has one of {', '.join(avoid)} in it; give another with --text"
            )
        self._sentences = [(part, max(1, count(" " + part))) for part in kept]

    def fill(self, needles: list[str], room: int, count: Counter, chance: random.Random) -> str:
        """`needles` at random places, in order, within filler of `room` tokens less theirs.

        Raises:
            InputError: The needles alone need more.
        """
        left = room - sum(count(" " + needle) for needle in needles)
        if left < 0:
            raise InputError(
                f"the facts to find need {room - left:,} tokens and the context has room for {room:,}; raise --ctx"
            )
        hay: list[str] = []
        while True:
            order = list(self._sentences)
            chance.shuffle(order)
            for sentence, tokens in order:
                if tokens > left:
                    return " ".join(_planted(hay, needles, chance))
                hay.append(sentence)
                left -= tokens


def _planted(hay: list[str], needles: list[str], chance: random.Random) -> list[str]:
    places = sorted(chance.randrange(len(hay) + 1) for _ in needles)
    for place, needle in reversed(list(zip(places, needles, strict=True))):
        hay.insert(place, needle)
    return hay
