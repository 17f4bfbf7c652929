"""LongBench's English and code data sets (arXiv 2308.14508): how each is asked and scored."""

from __future__ import annotations

from dataclasses import dataclass

from ds_offload.evaluation.metrics import (
    Metric,
    classification_score,
    code_similarity,
    count_score,
    f1_score,
    retrieval_score,
    rouge_l,
)

# They need a Chinese word segmenter.
CHINESE = ("multifieldqa_zh", "dureader", "vcsum", "lsht", "passage_retrieval_zh")


@dataclass(frozen=True)
class LongBenchSet:
    """One data set.

    Attributes:
        metric: Its score.
        max_new_tokens: Most tokens of an answer.
        task: What is asked behind the context; `{input}` is the row's own question.
        first_line: Whether only the answer's first line counts.
        chat: Whether the model's chat template is used: few-shot examples and code are continued instead.
    """

    metric: Metric
    max_new_tokens: int
    task: str
    first_line: bool = False
    chat: bool = True


_QA = "Answer the question from the text above, in as few words as you can.\n\nQuestion: {input}\nAnswer:"
_SUMMARY = "Write a one-page summary of the text above.\n\nSummary:"

SETS = {
    "narrativeqa": LongBenchSet(f1_score, 128, _QA),
    "qasper": LongBenchSet(f1_score, 128, _QA),
    "multifieldqa_en": LongBenchSet(f1_score, 64, _QA),
    "hotpotqa": LongBenchSet(f1_score, 32, _QA),
    "2wikimqa": LongBenchSet(f1_score, 32, _QA),
    "musique": LongBenchSet(f1_score, 32, _QA),
    "gov_report": LongBenchSet(rouge_l, 512, _SUMMARY),
    "qmsum": LongBenchSet(
        rouge_l, 512, "Answer the query about the meeting above in one or more sentences.\n\nQuery: {input}\nAnswer:"
    ),
    "multi_news": LongBenchSet(rouge_l, 512, _SUMMARY),
    "trec": LongBenchSet(classification_score, 64, "{input}", first_line=True, chat=False),
    "triviaqa": LongBenchSet(f1_score, 32, "{input}", first_line=True, chat=False),
    "samsum": LongBenchSet(rouge_l, 128, "{input}", first_line=True, chat=False),
    "passage_count": LongBenchSet(
        count_score, 32, "How many different paragraphs are there above, repeated ones counted once? Give the number."
    ),
    "passage_retrieval_en": LongBenchSet(
        retrieval_score,
        32,
        'Which paragraph above is this the abstract of? Answer "Paragraph" and its number.\n\n{input}\n\nAnswer:',
    ),
    "lcc": LongBenchSet(code_similarity, 64, "{input}", chat=False),
    "repobench-p": LongBenchSet(code_similarity, 64, "{input}", chat=False),
}
