"""Sequences to train on: a context, questions behind it, and what of it is learnt."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ds_offload.evaluation.haystack import sentences
from ds_offload.prompts import render_messages
from long_context.training_tasks import Turn, key_turn, key_values, keys_turn, prose_facts

# Kinds of tokens, one byte each. From FACT on, digits may be exchanged for others, all of a sequence's in one way.
PLAIN, TEXT, FACT, ANSWER = 0, 1, 2, 3
TASKS = ("passkey", "needles", "key-value", "tracing", "key-list")
LONGEST_SENTENCE, SHORTEST_TURN = 120, 32
_MARKS = "<<first>>", "<<answer>>", "<<second>>"

Pieces = list[tuple[str, int]]


@dataclass(frozen=True)
class ChatFrame:
    """What the chat template puts around messages."""

    opening: str
    answer: str
    further: str
    end: str

    @classmethod
    def of(cls, tokenizer: Any) -> ChatFrame:
        """Read off the tokenizer's template; `end` is the token that ends an answer."""
        roles = ("user", "assistant", "user")
        messages = [{"role": role, "content": mark} for role, mark in zip(roles, _MARKS, strict=True)]
        text = render_messages(messages, tokenizer)
        places = [text.index(mark) for mark in _MARKS]
        ends = [place + len(mark) for place, mark in zip(places, _MARKS, strict=True)]
        end = tokenizer.eos_token
        further = text[ends[1] : places[2]]
        if not further.startswith(end):
            raise SystemExit(f"the chat template does not end an answer with {end!r}, but with {further[:20]!r}")
        return cls(text[: places[0]], text[ends[0] : places[1]], further[len(end) :], end)

    def turns(self, turns: list[Turn]) -> Pieces:
        """Questions with their answers, from behind the context's last word on; the ends of answers are learnt."""
        pieces: Pieces = []
        for turn in turns:
            pieces.append((("" if pieces else "\n\n") + turn.question + self.answer, FACT))
            kind = ANSWER + TASKS.index(turn.task)
            pieces += [(text, kind if learnt else FACT) for text, learnt in turn.answer]
            pieces += [(self.end, kind), (self.further, FACT)]
        return pieces[:-1]


class Prose:
    """The sentences of a text with their tokens counted."""

    def __init__(self, text: str, tokenizer: Any) -> None:
        lines = sentences(text)
        sizes = [len(ids) for ids in tokenizer([f" {line}" for line in lines])["input_ids"]]
        self._kept = [(line, size) for line, size in zip(lines, sizes, strict=True) if size <= LONGEST_SENTENCE]

    def fill(self, room: int, chance: random.Random, in_order: bool) -> list[str]:
        """Sentences of at most `room` tokens: as they follow one another, or a few shuffled again and again."""
        found: list[str] = []
        start, pool = chance.randrange(len(self._kept)), []
        if not in_order:
            pool = [chance.choice(self._kept) for _ in range(chance.choice((60, 120, 250, 500)))]
        while True:
            if in_order:
                order = self._kept[start:] + self._kept[:start]
            else:
                order = list(pool)
                chance.shuffle(order)
            for line, size in order:
                if size > room:
                    return found
                found.append(line)
                room -= size


class SequenceMaker:
    """Makes sequences of one length after the other from texts and made-up facts.

    Args:
        texts: Prose by name.
        tokenizer: With offsets and a chat template.
    """

    def __init__(self, texts: dict[str, str], tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._frame = ChatFrame.of(tokenizer)
        self._prose = [Prose(text, tokenizer) for text in texts.values()]
        self._streams = [np.array(tokenizer(text, verbose=False)["input_ids"], np.uint16) for text in texts.values()]
        self._end = tokenizer.convert_tokens_to_ids(self._frame.end)

    def count(self, text: str) -> int:
        """Tokens of a text."""
        return len(self._tokenizer(text, verbose=False)["input_ids"])

    def text(self, length: int, chance: random.Random) -> tuple[np.ndarray, np.ndarray]:
        """`length` tokens of one text, all learnt."""
        stream = chance.choice([part for part in self._streams if len(part) > length])
        first = chance.randrange(len(stream) - length)
        return stream[first : first + length], np.full(length, TEXT, np.uint8)

    def prose(self, length: int, chance: random.Random) -> tuple[np.ndarray, np.ndarray]:
        """Facts in prose and questions about them."""
        named = round(8 * 2 ** chance.uniform(0, np.log2(max(16, min(length / 40, 400)) / 8)))
        while True:
            facts, turns = prose_facts(chance, named, chains=chance.choice((0, 3, 3, 3 + length // 8192)))
            # Questions take at most half of the sequence.
            turns = self._first(turns, length // 2 if length < 16_384 else length // 3)
            room = length - self._size(turns) - sum(self.count(f" {fact}") for fact in facts)
            if room >= length // 8:
                break
            named = max(1, named // 2)
        in_order = chance.random() < 0.5
        hay: Pieces = [
            (line, TEXT if in_order else PLAIN) for line in chance.choice(self._prose).fill(room, chance, in_order)
        ]
        places = sorted(chance.randrange(len(hay) + 1) for _ in facts)
        for place, fact in reversed(list(zip(places, facts, strict=True))):
            hay.insert(place, (fact, FACT))
        context = [(line if number == 0 else f" {line}", kind) for number, (line, kind) in enumerate(hay)]
        return self._sequence(context, turns, length)

    def key_values(self, length: int, chance: random.Random) -> tuple[np.ndarray, np.ndarray]:
        """A list of keys and values, and questions: keys one at a time, or many at once."""
        pairs = key_values(chance, length // 8)
        items = list(pairs.items())
        share = chance.uniform(0.35, 0.65) if length < 16_384 else chance.uniform(0.65, 0.85)
        lines = [f"{key}: {value}\n" for key, value in items]
        sizes = np.cumsum([len(ids) for ids in self._tokenizer(lines)["input_ids"]])
        kept = max(2, int(np.searchsorted(sizes, share * length)))
        asked = chance.sample(items[:kept], kept)
        turns: list[Turn] = []
        # Many keys in one turn cost fewer tokens each; the evaluation asks for one.
        share_of_many = chance.choice((0.0, 0.0, 0.06, 0.06, 1.0))
        while asked:
            many = chance.random() < share_of_many
            taken, asked = (asked[:16], asked[16:]) if many else (asked[:1], asked[1:])
            turns.append(keys_turn(taken) if many else key_turn(*taken[0]))
        turns = self._first(turns, length - int(sizes[kept - 1]))
        text = "".join(lines[:kept]).rstrip()
        return self._sequence([(text, FACT)], turns, length)

    def _first(self, turns: list[Turn], room: int) -> list[Turn]:
        """The turns that fit, taken in order, one at least."""
        room -= self.count(self._frame.opening)
        taken = []
        for turn in turns:
            size = self._turn_size(turn)
            if size <= room or not taken:
                taken.append(turn)
                room -= size
            if room < SHORTEST_TURN:
                break
        return taken

    def _size(self, turns: list[Turn]) -> int:
        return self.count(self._frame.opening) + sum(map(self._turn_size, turns))

    def _turn_size(self, turn: Turn) -> int:
        return self.count("".join(text for text, _ in self._frame.turns([turn])) + self._frame.further)

    def _sequence(self, context: Pieces, turns: list[Turn], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and their kinds; what is over at the end is cut, what lacks is filled with ends."""
        pieces = [(self._frame.opening, PLAIN), *context, *self._frame.turns(turns)]
        text = "".join(part for part, _ in pieces)
        kinds = np.repeat([kind for _, kind in pieces], [len(part) for part, _ in pieces]).astype(np.uint8)
        encoded = self._tokenizer(text, return_offsets_mapping=True, verbose=False)
        last = np.array([end - 1 for _, end in encoded["offset_mapping"]][:length])
        ids = np.full(length, self._end, np.uint16)
        ids[: len(last)] = encoded["input_ids"][:length]
        of_tokens = np.full(length, PLAIN, np.uint8)
        of_tokens[: len(last)] = kinds[last]
        return ids, of_tokens


Make = Callable[[int, random.Random], tuple[np.ndarray, np.ndarray]]


def make_sequences(maker: SequenceMaker, length: int, count: int, seed: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens `[count, length]` uint16 and kinds uint8: two fifths prose, two fifths lists, a fifth text."""
    makers: tuple[Make, ...] = (maker.prose, maker.key_values, maker.text, maker.key_values, maker.prose)
    made = [makers[number % 5](length, random.Random(f"{seed} {length} {number}")) for number in range(count)]
    return np.stack([ids for ids, _ in made]), np.stack([kinds for _, kinds in made])
