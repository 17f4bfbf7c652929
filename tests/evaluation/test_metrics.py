"""Each metric against cases computed by hand."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from ds_offload import InputError
from ds_offload.evaluation.agreement import kl_divergence
from ds_offload.evaluation.longdoc import best_score
from ds_offload.evaluation.metrics import (
    classification_score,
    code_similarity,
    count_score,
    f1_score,
    found_share,
    normalize_answer,
    retrieval_score,
    rouge_l,
)


@pytest.mark.parametrize(
    ("given", "expected", "score"),
    [
        ("The Jupiter project.", "the Jupiter project", 1.0),
        ("Jupiter", "the Jupiter project", 2 / 3),
        # 2 of 4 words are right, of 3 wanted: 2 * 2 / (4 + 3).
        ("it was Don Woods", "Don Woods himself", 4 / 7),
        # A word counts as often as it stands in both.
        ("Don Don Don", "Don Woods", 2 / 5),
        ("nothing of it", "Don Woods", 0.0),
        ("", "Don Woods", 0.0),
        ("the", "a", 1.0),
    ],
)
def test_f1(given: str, expected: str, score: float) -> None:
    assert f1_score(given, expected) == pytest.approx(score)


def test_the_normal_form_has_no_case_articles_punctuation_or_double_spaces() -> None:
    assert normalize_answer(" The  New Hacker's Dictionary, a book. ") == "new hackers dictionary book"


@pytest.mark.parametrize(
    ("given", "expected", "score"),
    [
        ("the cat sat", "the cat sat", 1.0),
        # The longest common subsequence has 3 words: P = 3/4, R = 3/3.
        ("the cat sat down", "the cat sat", 6 / 7),
        # In another order only one word is left.
        ("sat cat the", "the cat sat", 1 / 3),
        ("", "the cat sat", 0.0),
    ],
)
def test_rouge_l(given: str, expected: str, score: float) -> None:
    pytest.importorskip("rouge_score")
    assert rouge_l(given, expected) == pytest.approx(score)


def test_rouge_without_its_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec

    def hidden(name: str, *rest: Any) -> Any:
        return None if name == "rouge_score" else find(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", hidden)
    with pytest.raises(InputError, match="pip install rouge-score"):
        rouge_l("a", "b")


@pytest.mark.parametrize(
    ("given", "score"),
    [
        ("Type: Individual", 1.0),
        ("Individual or Location", 1 / 2),
        ("Location", 0.0),
        # A class inside the right one's name does not count against it.
        ("Definition of something", 1.0),
        ("nothing", 0.0),
    ],
)
def test_classification(given: str, score: float) -> None:
    classes = ["Individual", "Location", "Definition of something", "Definition"]
    expected = "Definition of something" if given.startswith("Definition") else "Individual"
    assert classification_score(given, expected, classes) == score


def test_paragraphs_and_counts() -> None:
    assert retrieval_score("Paragraph 3", "Paragraph 3") == 1.0
    assert retrieval_score("Paragraph 3 or 13, not 4", "Paragraph 3") == pytest.approx(1 / 3)
    assert retrieval_score("none", "Paragraph 3") == 0.0
    assert count_score("There are 7, I think 7.", "7") == 1.0
    assert count_score("7 of 17", "7") == 0.5
    assert count_score("seven", "7") == 0.0


def test_code_takes_the_first_line_that_is_code() -> None:
    assert code_similarity("```\n# a comment\n// another\nreturn x", "return x") == 1.0
    # 7 of 8 letters match on both sides.
    assert code_similarity("return y", "return x") == pytest.approx(14 / 16)
    assert code_similarity("# only a comment", "return x") == 0.0


def test_found_words_are_whole() -> None:
    assert found_share("It is 12345.", ["12345"]) == 1.0
    assert found_share("It is 123456.", ["12345"]) == 0.0
    assert found_share("ABCDE, FGHIJ", ["ABCDE", "FGHIJ", "KLMNO", "PQRST"]) == 0.5


def test_the_best_answer_counts() -> None:
    assert best_score("Stanford", ["at Stanford in 1975", "Stanford"], f1_score) == 1.0


def test_kl_of_two_choices() -> None:
    # P = (3/4, 1/4), Q = (1/2, 1/2): 3/4 ln(3/2) + 1/4 ln(1/2).
    dense, sparse = torch.tensor([0.75, 0.25]).log(), torch.tensor([1.0, 1.0])
    assert kl_divergence(dense, sparse) == pytest.approx(0.75 * 0.4054651 - 0.25 * 0.6931472, abs=1e-6)
    assert kl_divergence(dense, dense) == pytest.approx(0, abs=1e-7)
