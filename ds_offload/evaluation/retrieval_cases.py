"""Made-up questions whose answers stand in a long context, in the manner of RULER (arXiv 2404.06654)."""

from __future__ import annotations

import random
import string
from collections.abc import Callable
from dataclasses import dataclass

from ds_offload.errors import InputError
from ds_offload.evaluation.haystack import Counter, Haystack

CITIES = (
    "Lisbon",
    "Oslo",
    "Nairobi",
    "Quito",
    "Hanoi",
    "Dublin",
    "Tunis",
    "Lima",
    "Vienna",
    "Accra",
    "Sofia",
    "Havana",
    "Cairo",
    "Prague",
    "Manila",
    "Bogota",
    "Riga",
    "Athens",
    "Seoul",
    "Madrid",
    "Dakar",
    "Zagreb",
    "Tirana",
    "Suva",
)
NEEDLES = 10
CHAIN, CHAINS = 4, 3


@dataclass(frozen=True)
class RetrievalCase:
    """One question.

    Attributes:
        task: Its kind.
        context: What the answer is in.
        question: Asked behind it.
        answers: Words or numbers that the answer must name, all of them.
    """

    task: str
    context: str
    question: str
    answers: tuple[str, ...]


Maker = Callable[[Haystack, int, Counter, random.Random], RetrievalCase]


def passkey(hay: Haystack, room: int, count: Counter, chance: random.Random) -> RetrievalCase:
    """One number in filler."""
    key = _number(chance)
    context = hay.fill([f"The pass key is {key}. Remember it."], room, count, chance)
    return RetrievalCase("passkey", context, "What is the pass key? Answer with the number only.", (key,))


def needles(hay: Haystack, room: int, count: Counter, chance: random.Random) -> RetrievalCase:
    """Ten cities' codes in filler; one is asked for."""
    codes = dict(zip(chance.sample(CITIES, NEEDLES), _numbers(chance, NEEDLES), strict=True))
    context = hay.fill([f"The access code for {city} is {code}." for city, code in codes.items()], room, count, chance)
    city = chance.choice(list(codes))
    question = f"What is the access code for {city}? Answer with the number only."
    return RetrievalCase("needles", context, question, (codes[city],))


def key_value(hay: Haystack, room: int, count: Counter, chance: random.Random) -> RetrievalCase:
    """A list of keys and values, as long as there is room; one key is asked for."""
    lines: dict[str, str] = {}
    left = room
    while True:
        key, value = "".join(chance.choices(string.ascii_lowercase, k=6)), _number(chance)
        left -= count(f"\n{key}: {value}")
        if left < 0:
            break
        lines.setdefault(key, value)
    if not lines:
        raise InputError(f"the context has room for {room:,} tokens, too few for a key and its value; raise --ctx")
    key = chance.choice(list(lines))
    context = "\n".join(f"{name}: {value}" for name, value in lines.items())
    question = f"What is the value of the key {key} in the list above? Answer with the number only."
    return RetrievalCase("key-value", context, question, (lines[key],))


def tracing(hay: Haystack, room: int, count: Counter, chance: random.Random) -> RetrievalCase:
    """Chains of assignments in filler; all names that end up with one value are asked for."""
    names = _names(chance, CHAIN * CHAINS)
    values = _numbers(chance, CHAINS)
    queues = []
    for number, value in enumerate(values):
        chain = names[number * CHAIN : (number + 1) * CHAIN]
        sources = [value, *chain[:-1]]
        queues.append([f"VAR {name} = {source}." for name, source in zip(chain, sources, strict=True)])
    # The chains are mixed; each stays in order.
    turns = [number for number in range(CHAINS) for _ in range(CHAIN)]
    chance.shuffle(turns)
    context = hay.fill([queues[number].pop(0) for number in turns], room, count, chance)
    asked = chance.randrange(CHAINS)
    question = (
        f"Which variables have the value {values[asked]}, directly or through other variables? "
        "Answer with their names only."
    )
    return RetrievalCase("tracing", context, question, tuple(names[asked * CHAIN : (asked + 1) * CHAIN]))


MAKERS: dict[str, Maker] = {"passkey": passkey, "needles": needles, "key-value": key_value, "tracing": tracing}


def _number(chance: random.Random) -> str:
    return str(chance.randrange(10000, 100000))


def _numbers(chance: random.Random, count: int) -> list[str]:
    return [str(number) for number in chance.sample(range(10000, 100000), count)]


def _names(chance: random.Random, count: int) -> list[str]:
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(chance.choices(string.ascii_uppercase, k=5))] = None
    return list(names)
