"""Scores of answers against expected ones, from 0 to 1: SQuAD's F1, ROUGE-L and LongBench's own."""

from __future__ import annotations

import difflib
import importlib.util
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from ds_offload.errors import InputError

# answer given, answer expected, all classes of the task
Metric = Callable[[str, str, Sequence[str]], float]

_ROUGE_MISSING = "ROUGE needs rouge-score, which is not installed; run: pip install rouge-score"


def normalize_answer(text: str) -> str:
    """Lower case, without punctuation, articles and more than one space: SQuAD's normal form."""
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def f1_score(given: str, expected: str, classes: Sequence[str] = ()) -> float:
    """Harmonic mean of precision and recall over the words of the normal forms (SQuAD)."""
    got, wanted = normalize_answer(given).split(), normalize_answer(expected).split()
    if not got or not wanted:
        return float(got == wanted)
    same = sum((Counter(got) & Counter(wanted)).values())
    return 2 * same / (len(got) + len(wanted))


def check_rouge() -> None:
    """Refuse a task that needs ROUGE where rouge-score is missing.

    Raises:
        InputError: With the command that installs it.
    """
    if importlib.util.find_spec("rouge_score") is None:
        raise InputError(_ROUGE_MISSING)


def rouge_l(given: str, expected: str, classes: Sequence[str] = ()) -> float:
    """F-measure of the longest common subsequence of words, by rouge-score without stemming.

    Raises:
        InputError: rouge-score is not installed.
    """
    check_rouge()
    from rouge_score import rouge_scorer

    return float(rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False).score(expected, given)["rougeL"].fmeasure)


def classification_score(given: str, expected: str, classes: Sequence[str]) -> float:
    """One over the classes named in the answer, 0 where the right one is not among them (LongBench).

    A class that is part of the right one's name does not count.
    """
    named = [name for name in classes if name in given and (name not in expected or name == expected)]
    return 1 / len(named) if expected in named else 0.0


def retrieval_score(given: str, expected: str, classes: Sequence[str] = ()) -> float:
    """Share of the numbers in the answer that are the paragraph's of "Paragraph N" (LongBench)."""
    wanted = re.findall(r"Paragraph (\d+)", expected)
    return _share_of_numbers(given, wanted[0]) if wanted else 0.0


def count_score(given: str, expected: str, classes: Sequence[str] = ()) -> float:
    """Share of the numbers in the answer that are the expected one (LongBench)."""
    return _share_of_numbers(given, expected.strip())


def code_similarity(given: str, expected: str, classes: Sequence[str] = ()) -> float:
    """Similarity of the answer's first line of code to the expected line, by difflib.

    LongBench takes the same ratio from fuzzywuzzy, which is difflib's, rounded to a percent.
    """
    lines = given.lstrip("\n").split("\n")
    code = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return difflib.SequenceMatcher(None, code, expected).ratio()


def found_share(given: str, expected: Sequence[str]) -> float:
    """Share of the expected words or numbers that stand in the answer, each whole."""
    return sum(_stands_in(word, given) for word in expected) / len(expected)


def _stands_in(word: str, text: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text) is not None


def _share_of_numbers(given: str, wanted: str) -> float:
    numbers = re.findall(r"\d+", given)
    return numbers.count(wanted) / len(numbers) if numbers else 0.0
