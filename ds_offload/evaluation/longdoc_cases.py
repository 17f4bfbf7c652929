"""Questions and summaries over the documents that come with the package; answers are quoted from them."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources


@dataclass(frozen=True)
class LongdocCase:
    """One task over a document.

    Attributes:
        task: "question" or "summary".
        document: File in `ds_offload/data`.
        prompt: Asked behind the document.
        answers: Acceptable answers, verbatim in the document; of a summary, a reference of ours.
    """

    task: str
    document: str
    prompt: str
    answers: tuple[str, ...]

    def text(self) -> str:
        """The whole document."""
        return resources.files("ds_offload").joinpath("data", self.document).read_text(encoding="utf-8")


def _questions(document: str, pairs: dict[str, tuple[str, ...]]) -> list[LongdocCase]:
    return [
        LongdocCase("question", document, f"{question} Answer in a few words.", answers)
        for question, answers in pairs.items()
    ]


_JARGON = {
    "Who began the Jargon File?": ("Raphael Finkel",),
    "In which year was the Jargon File begun?": ("1975",),
    "Where did Raphael Finkel begin the Jargon File?": ("Stanford", "at Stanford in 1975"),
    "Who copied the File to MIT in 1976?": ("Mark Crispin",),
    "Under which name did Mark Crispin store the File on his directory?": ("AI:MRC;SAIL JARGON",),
    "Who became the SAIL contact for the File after Raphael Finkel?": ("Don Woods",),
    "Who published a large chunk of the File in 1981?": ("Charles Spurgeon", "a hacker named Charles Spurgeon"),
    "What is the title of the book of 1983 that Guy Steele edited?": ("The Hacker's Dictionary",),
    "Which project was cancelled at Digital Equipment Corporation in April 1983?": ("the Jupiter project", "Jupiter"),
    "Which publisher published The New Hacker's Dictionary?": ("MIT Press",),
    "When was the 4.0.0 version published?": ("September 1996",),
    "Who maintains the new File?": ("Eric S. Raymond",),
}
_SUMMARIES = {
    "Summarize the text above in about 80 words.": (
        "The Jargon File is a collection of slang used by computer hackers. The first chapter explains that hacker "
        "slang holds a loosely networked culture together and shows how playfully and precisely hackers use language. "
        "The revision history tells how Raphael Finkel began the File at Stanford in 1975, how it was copied to MIT "
        "and grew until 1983, when Guy Steele edited it into The Hacker's Dictionary, how it then stood still for "
        "seven years, and how Eric S. Raymond revived it as The New Hacker's Dictionary.",
    ),
    "Tell the history of the Jargon File in about 60 words.": (
        "Raphael Finkel began the Jargon File at Stanford in 1975. Mark Crispin copied it to MIT in 1976, where he and "
        "Guy L. Steele Jr. extended it. It became a book, The Hacker's Dictionary, in 1983 and then stopped growing. "
        "Eric S. Raymond later revised it with jargon of Usenet, Unix and C; MIT Press published it as The New "
        "Hacker's Dictionary from 1991 on.",
    ),
}

CASES = [
    *_questions("jargon_file.txt", _JARGON),
    *(LongdocCase("summary", "jargon_file.txt", prompt, answers) for prompt, answers in _SUMMARIES.items()),
]
