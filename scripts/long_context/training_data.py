"""The file of training sequences: made once on a CPU, read where the training runs."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from long_context.training_sequences import ANSWER, FACT, SequenceMaker, make_sequences

# Length to tokens of all its sequences.
AMOUNTS = {
    1024: 1_500_000,
    2048: 2_000_000,
    4096: 2_500_000,
    8192: 3_500_000,
    16384: 5_000_000,
    32768: 5_000_000,
    65536: 5_000_000,
}
# Token ids of the digits 1 to 9 follow one another.
DIGITS = 9


class TrainingData:
    """Sequences by length.

    Attributes:
        tokens: Length to `[N, length]` uint16.
        kinds: Length to `[N, length]` uint8; see training_sequences.py.
        first_digit: Token id of "1".
    """

    def __init__(self, tokens: dict[int, np.ndarray], kinds: dict[int, np.ndarray], first_digit: int) -> None:
        self.tokens, self.kinds, self.first_digit = tokens, kinds, first_digit

    @classmethod
    def make(cls, maker: SequenceMaker, first_digit: int, amounts: dict[int, int], seed: str) -> TrainingData:
        """As many sequences of each length as its tokens allow, five at least: one of each kind."""
        tokens, kinds = {}, {}
        for length, amount in amounts.items():
            started, count = time.monotonic(), max(5, amount // length)
            tokens[length], kinds[length] = make_sequences(maker, length, count, seed)
            answers = (kinds[length] >= ANSWER).sum() / count
            took = time.monotonic() - started
            print(f"{count} sequences of {length} tokens, {answers:.0f} of them answers ({took:.0f} s)", flush=True)
        return cls(tokens, kinds, first_digit)

    def save(self, path: Path) -> None:
        """Write one compressed file."""
        arrays = {f"tokens_{length}": array for length, array in self.tokens.items()}
        arrays |= {f"kinds_{length}": array for length, array in self.kinds.items()}
        np.savez_compressed(path, first_digit=self.first_digit, **arrays)

    @classmethod
    def load(cls, path: Path) -> TrainingData:
        """Read it."""
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
        first_digit = int(arrays.pop("first_digit"))
        lengths = sorted(int(name.removeprefix("tokens_")) for name in arrays if name.startswith("tokens_"))
        tokens = {length: arrays[f"tokens_{length}"] for length in lengths}
        return cls(tokens, {length: arrays[f"kinds_{length}"] for length in lengths}, first_digit)

    def batch(self, length: int, used: int, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """The next `count` sequences of a length after `used` of them: tokens int64 and kinds, `[count, length]`.

        All are used once before one is used again, each time in another order and with other digits in its facts,
        questions and answers.
        """
        total = len(self.tokens[length])
        rows, drawn = [], []
        for number in range(used, used + count):
            order = np.random.default_rng([seed, length, number // total]).permutation(total)
            rows.append(order[number % total])
            digits = np.random.default_rng([seed, length, number, 1]).permutation(DIGITS)
            drawn.append(
                exchanged(self.tokens[length][rows[-1]], self.kinds[length][rows[-1]], self.first_digit, digits)
            )
        return np.stack(drawn), self.kinds[length][rows]


def exchanged(tokens: np.ndarray, kinds: np.ndarray, first_digit: int, digits: np.ndarray) -> np.ndarray:
    """`tokens` as int64, the digits 1 to 9 of facts and answers exchanged: digit d becomes `digits[d - 1] + 1`."""
    tokens = tokens.astype(np.int64)
    places = (kinds >= FACT) & (tokens >= first_digit) & (tokens < first_digit + DIGITS)
    tokens[places] = digits[tokens[places] - first_digit] + first_digit
    return tokens
