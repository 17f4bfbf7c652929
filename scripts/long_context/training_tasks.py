"""Facts and questions to train retrieval on: of the kinds that `ds-offload eval retrieval` asks, with other names."""

from __future__ import annotations

import random
import string
from dataclasses import dataclass

_PLACES = """
Aberdeen Adelaide Algiers Amman Ankara Antwerp Asmara Baku Bamako Bangkok Barcelona Basel Beirut Belgrade Bergen
Berlin Bern Bilbao Boston Bristol Brussels Bucharest Budapest Calgary Canberra Caracas Chicago Cologne Copenhagen
Cordoba Damascus Delhi Denver Detroit Dhaka Doha Dresden Durban Edinburgh Florence Freetown Geneva Genoa Georgetown
Ghent Glasgow Gothenburg Granada Graz Hamburg Harare Helsinki Hobart Houston Innsbruck Istanbul Izmir Jakarta
Kampala Karachi Kathmandu Khartoum Kingston Kinshasa Krakow Kyoto Lagos Leipzig Leon Ljubljana London Luanda Lusaka
Lyon Managua Maputo Marseille Medellin Melbourne Memphis Mexico Miami Milan Minsk Mombasa Monrovia Montreal Moscow
Mumbai Munich Naples Nice Nicosia Osaka Ottawa Palermo Panama Paris Perth Porto Pretoria Rabat Rome Rotterdam
Salzburg Santiago Sapporo Seattle Seville Singapore Skopje Split Stockholm Stuttgart Sydney Taipei Tallinn Tbilisi
Tehran Tokyo Toronto Toulouse Trieste Tripoli Turin Utrecht Valencia Venice Vilnius Warsaw Windhoek Yerevan Zurich
"""
# None is one of `ds_offload.evaluation.retrieval_cases.CITIES`.
NAMES = tuple(_PLACES.split())
NUMBER_ONLY = "Answer with the number only."

# Facts of which a context has one: said, and asked for.
SINGLE = (
    ("The pass key is {value}. Remember it.", f"What is the pass key? {NUMBER_ONLY}"),
    ("The magic number is {value}. Keep it in mind.", f"What is the magic number? {NUMBER_ONLY}"),
    ("The combination of the safe is {value}.", f"What is the combination of the safe? {NUMBER_ONLY}"),
    ("The number of the lost ticket is {value}.", f"What is the number of the lost ticket? {NUMBER_ONLY}"),
)
# Facts about a name.
NAMED = (
    ("The access code for {name} is {value}.", f"What is the access code for {{name}}? {NUMBER_ONLY}"),
    ("The locker in {name} has the number {value}.", f"What number does the locker in {{name}} have? {NUMBER_ONLY}"),
    ("The office in {name} answers at extension {value}.", f"At which extension does {{name}} answer? {NUMBER_ONLY}"),
    ("{value} parcels were sent to {name}.", f"How many parcels were sent to {{name}}? {NUMBER_ONLY}"),
)
VALUE_OF_KEY = f"What is the value of the key {{key}} in the list above? {NUMBER_ONLY}"
MANY_KEYS = "Give the keys {keys} of the list above with their values, one on a line."
TRACED = "Which variables have the value {value}, directly or through other variables? Answer with their names only."
CHAIN = 4


@dataclass(frozen=True)
class Turn:
    """A question and its answer.

    Attributes:
        task: The kind, a name of `training_sequences.TASKS`.
        question: Asked.
        answer: Its parts, each with whether it is learnt.
    """

    task: str
    question: str
    answer: tuple[tuple[str, bool], ...]


def number(chance: random.Random) -> str:
    """Five digits."""
    return str(chance.randrange(10000, 100000))


def prose_facts(chance: random.Random, named: int, chains: int) -> tuple[list[str], list[Turn]]:
    """Sentences to hide, chains of assignments in order, and a turn for each fact.

    Args:
        named: How many facts about names, and `chains` how many chains of assignments.
    """
    facts: list[str] = []
    turns: list[Turn] = []
    for said, asked in chance.sample(SINGLE, chance.choice((1, 1, 2, len(SINGLE)))):
        value = number(chance)
        facts.append(said.format(value=value))
        turns.append(Turn("passkey", asked, ((value, True),)))
    # Half of the contexts have facts of one form, which are the hardest to tell apart.
    forms = NAMED[:1] if chance.random() < 0.5 else NAMED
    pairs = [(name, form) for name in NAMES for form in forms]
    for name, (said, asked) in chance.sample(pairs, min(named, len(pairs))):
        value = number(chance)
        facts.append(said.format(name=name, value=value))
        turns.append(Turn("needles", asked.format(name=name), ((value, True),)))
    chance.shuffle(facts)
    assignments, traced = _chains(chance, chains)
    order = [facts] * len(facts) + [assignments] * len(assignments)
    chance.shuffle(order)
    turns += traced
    chance.shuffle(turns)
    return [kind.pop(0) for kind in order], turns


def _chains(chance: random.Random, chains: int) -> tuple[list[str], list[Turn]]:
    names = _distinct(chance, CHAIN * chains, string.ascii_uppercase, 5)
    queues, turns = [], []
    for first in range(0, len(names), CHAIN):
        value, chain = number(chance), names[first : first + CHAIN]
        sources = [value, *chain[:-1]]
        queues.append([f"VAR {name} = {source}." for name, source in zip(chain, sources, strict=True)])
        turns.append(Turn("tracing", TRACED.format(value=value), ((", ".join(chain), True),)))
    order = [place for place in range(chains) for _ in range(CHAIN)]
    chance.shuffle(order)
    return [queues[place].pop(0) for place in order], turns


def key_values(chance: random.Random, count: int) -> dict[str, str]:
    """Keys and values: mostly keys as evaluations have them, else capitals or words with a number."""
    kind = chance.random()
    if kind < 0.7:
        keys = _distinct(chance, count, string.ascii_lowercase, 6)
    elif kind < 0.85:
        keys = _distinct(chance, count, string.ascii_uppercase, 5)
    else:
        keys = list({f"{chance.choice(NAMES).lower()}-{chance.randrange(1000)}": None for _ in range(count)})
    return {key: number(chance) for key in keys}


def key_turn(key: str, value: str) -> Turn:
    """One key asked for, in the words of the evaluation."""
    return Turn("key-value", VALUE_OF_KEY.format(key=key), ((value, True),))


def keys_turn(pairs: list[tuple[str, str]]) -> Turn:
    """Several keys asked for at once; only their values are learnt, the keys stand in the question."""
    answer = [part for key, value in pairs for part in ((f"{key}: ", False), (f"{value}", True), ("\n", False))]
    return Turn("key-list", MANY_KEYS.format(keys=", ".join(key for key, _ in pairs)), tuple(answer[:-1]))


def _distinct(chance: random.Random, count: int, letters: str, length: int) -> list[str]:
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(chance.choices(letters, k=length))] = None
    return list(names)
