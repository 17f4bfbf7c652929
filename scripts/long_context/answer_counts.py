"""How many answers are right word for word, counted by length and task."""

from __future__ import annotations

import numpy as np

from long_context.training_sequences import ANSWER, TASKS

Counts = dict[str, dict[str, list[int]]]


def count_answers(counts: Counts, length: int, places: np.ndarray, kinds: np.ndarray, right: np.ndarray) -> None:
    """Add a batch's answers to `counts`: length to task to right answers and all.

    An answer is right if every token of it, its end too, is the model's first choice behind the true ones before it.

    Args:
        places: Where the predicted tokens stand in the flattened batch `[N]`, ascending.
        kinds: Their kinds `[N]`.
        right: Whether each was predicted, `[N]` bool.
    """
    answers = kinds >= ANSWER
    places, kinds, right = places[answers], kinds[answers], right[answers]
    if not len(places):
        return
    begins = np.flatnonzero(np.r_[True, (np.diff(places) != 1) | (np.diff(kinds.astype(int)) != 0)])
    whole = np.logical_and.reduceat(right, begins)
    of_length = counts.setdefault(str(length), {})
    for kind, hit in zip(kinds[begins], whole, strict=True):
        cell = of_length.setdefault(TASKS[kind - ANSWER], [0, 0])
        cell[0] += int(hit)
        cell[1] += 1


def counts_line(counts: Counts) -> str:
    """In words, such as `16k: passkey 12/12, needles 40/52`."""
    return "; ".join(
        f"{int(length) // 1024}k: "
        + ", ".join(f"{task} {right}/{asked}" for task, (right, asked) in sorted(of.items()))
        for length, of in sorted(counts.items(), key=lambda pair: int(pair[0]))
    )
