"""Planted facts in 2,048-token documents: a budget of 256 tokens finds what dense attention finds."""

from __future__ import annotations

import random
from importlib.resources import files
from typing import Any

import pytest

from ds_offload import OffloadConfig, OffloadedGenerator
from ds_offload.evaluation.retrieval_cases import CITIES

DOCUMENT_TOKENS = 2048


def planted_document(seed: int, tokenizer: Any) -> tuple[str, dict[str, str]]:
    """A document of about 2,048 tokens with ten facts spread evenly, and the facts: city to code."""
    chance = random.Random(seed)
    facts = {city: str(chance.randrange(1000, 10000)) for city in chance.sample(CITIES[:20], 10)}
    text = files("ds_offload").joinpath("data", "jargon_file.txt").read_text(encoding="utf-8")
    paragraphs = [part.replace("\n", " ") for part in text.split("\n\n") if len(part) > 100]
    chance.shuffle(paragraphs)
    sentences = [f"{part.strip(' .')}." for whole in paragraphs for part in whole.split(". ") if len(part) > 20]
    planted = [f"The access code for {city} is {code}." for city, code in facts.items()]
    room = DOCUMENT_TOKENS - sum(len(tokenizer(fact)["input_ids"]) for fact in planted)
    filler: list[str] = []
    for sentence in sentences:
        room -= len(tokenizer(" " + sentence)["input_ids"])
        if room < 0:
            break
        filler.append(sentence)
    for number in reversed(range(len(planted))):
        filler.insert(round((number + 0.5) * len(filler) / len(planted)), planted[number])
    return " ".join(filler), facts


@pytest.mark.slow
def test_twenty_questions_at_a_budget_of_256_tokens(smollm2: Any) -> None:
    right = {}
    for budget in ("1/1", 256):
        with OffloadedGenerator.from_pretrained(config=OffloadConfig(token_budget=budget), device="cpu") as gen:
            found = []
            for seed in range(2):
                document, facts = planted_document(seed, gen.tokenizer)
                assert abs(len(gen.tokenizer(document)["input_ids"]) - DOCUMENT_TOKENS) < 64
                with gen.prefill(document) as session:
                    for city, code in facts.items():
                        question = f"What is the access code for {city}? Answer with the number only."
                        out = session.ask(question, keep=False, max_new_tokens=14)
                        found.append(code in out.text)
            right[budget] = sum(found)
    assert right["1/1"] >= 8, right
    assert right[256] >= right["1/1"] - 2, right
