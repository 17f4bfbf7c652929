"""The label cache: a code of every key in a few bits, the only thing on the device that grows with the context."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor

from ds_offload.kernels.new_token import LabelRows
from ds_offload.kernels.product_code import ProductRows
from ds_offload.memory.label_code import LabelCode

# Tokens encoded at a time: their float32 copies are what a prompt's labels cost in workspace.
_PROMPT_CHUNK = 4096


class LabelCache:
    """Labels of B sequences, packed `[L, Hkv, N, row_bytes]` uint8 on the device, N tokens of all sequences in a row.

    Sequence b's token t stands at `starts[b] + t`, so unequal lengths waste nothing.

    Hand-overs: whoever writes a label, of a prompt or of a new token (`layer`), does so on
    its stream; scores on another stream must wait for an event recorded behind it.

    Args:
        code: What labels are, of all layers.
        capacities: Most tokens of each sequence.
        device: Where the labels live.
    """

    def __init__(self, code: LabelCode, capacities: list[int], device: torch.device) -> None:
        self.code = code
        offsets = [0]
        for capacity in capacities:
            offsets.append(offsets[-1] + capacity)
        self._offsets = offsets
        self.starts = torch.tensor(offsets[:-1], dtype=torch.int64, device=device)
        shape = (code.layers, code.kv_heads, offsets[-1], code.row_bytes)
        self.rows = torch.zeros(shape, dtype=torch.uint8, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes of all labels."""
        return self.rows.nbytes

    def write_prompt(
        self, layer: int, sequence: int, start: int, keys: Tensor, stored_as: torch.dtype | None = None
    ) -> None:
        """Encode keys `[Hkv, n, D]` as the labels of tokens `start` to `start + n` of `sequence`.

        Args:
            stored_as: Round the keys to this dtype first, so that the labels can be made again from stored rows.
        """
        first = self._offsets[sequence] + start
        for begin in range(0, keys.shape[1], _PROMPT_CHUNK):
            chunk = slice(begin, min(begin + _PROMPT_CHUNK, keys.shape[1]))
            stored = keys[:, chunk].to(stored_as or keys.dtype)
            self.code.encode(layer, stored, self.rows[layer, :, first + chunk.start : first + chunk.stop])

    def of(self, sequence: int) -> LabelCache:
        """The labels of one of the sequences alone, to be scored: a view."""
        one = copy.copy(self)
        one.starts = self.starts[sequence : sequence + 1]
        return one

    def parts(self, layer: int, sequence: int, stop: int) -> Iterator[Tensor]:
        """Labels of tokens 0 to `stop` where they lie: contiguous `[n, row_bytes]` uint8, by KV head."""
        first = self._offsets[sequence]
        for head in self.rows[layer]:
            yield head[first : first + stop]

    def layer(self, layer: int) -> LabelRows | ProductRows:
        """One layer's labels, as the kernel that labels a new token wants them: `new_token`, or `encode_new`."""
        return self.code.new_rows(layer, self.rows[layer], self.starts)

    def scores(
        self,
        layer: int,
        query: Tensor,
        lengths: Tensor,
        max_length: int,
        scaling: float,
        weights: bool = False,
        order: bool = False,
    ) -> Tensor:
        """Scores of every token for every KV head, as `group_scores` and `product_scores` give them.

        Args:
            layer: Whose labels.
            query: Rotated queries `[B, H, D]`, any float dtype.
            lengths: Tokens to score of each sequence, `[B]` int64 on the device.
            max_length: At least every entry of `lengths`.
            scaling: Factor of the attention scores.
            weights: Attention weights, also with one query head per KV head.
            order: Only the order of a KV head's tokens matters: scores may be whole numbers instead.

        Returns:
            `[B, Hkv, max_length]` float32. With several query heads per KV head, or with
            `weights`: the heads' softmax over the tokens, summed, and 0 at and beyond
            `lengths`. Else the scores, and -inf there. With `order`, where the code gives them, int16
            numbers that order tokens as these do, and -1 there.
        """
        rows = self.rows[layer]
        return self.code.scores(layer, rows, query, self.starts, lengths, max_length, scaling, weights, order)
