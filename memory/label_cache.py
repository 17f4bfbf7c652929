"""The label cache: a few quantised channels of every key, the only thing on the device that grows with the context."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor

from ds_offload.kernels.label_codec import LabelLayout, encode_labels
from ds_offload.kernels.label_scores import group_scores
from ds_offload.kernels.new_token import LabelRows

# Tokens encoded at a time: their float32 copies are what a prompt's labels cost in workspace.
_PROMPT_CHUNK = 4096


class LabelCache:
    """Labels of B sequences, packed `[L, Hkv, N, row_bytes]` uint8 on the device, N tokens of all sequences in a row.

    Sequence b's token t stands at `starts[b] + t`, so unequal lengths waste nothing.
    A label is the key's kept channels less their mean over the calibration text (the
    mean adds the same to every score of a query, so it changes no ranking).

    Hand-overs: whoever writes a label, of a prompt or of a new token (`layer`), does so on
    its stream; scores on another stream must wait for an event recorded behind it.

    Args:
        layout: The code.
        channels: Channels in descending importance, `[L, Hkv, D]` int64; the first R are kept.
        key_mean: Mean key `[L, Hkv, D]` float32.
        capacities: Most tokens of each sequence.
        device: Where the labels live.
    """

    def __init__(
        self, layout: LabelLayout, channels: Tensor, key_mean: Tensor, capacities: list[int], device: torch.device
    ) -> None:
        self.layout = layout
        layers, kv_heads, _ = channels.shape
        kept = channels[..., : layout.channels].contiguous()
        self._channels = kept.to(device)
        self._mean = key_mean.gather(-1, kept).to(device)
        offsets = [0]
        for capacity in capacities:
            offsets.append(offsets[-1] + capacity)
        self._offsets = offsets
        self.starts = torch.tensor(offsets[:-1], dtype=torch.int64, device=device)
        self.rows = torch.zeros(layers, kv_heads, offsets[-1], layout.row_bytes, dtype=torch.uint8, device=device)

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
        channels = self._channels[layer][:, None].expand(-1, keys.shape[1], -1)
        mean = self._mean[layer][:, None]
        for begin in range(0, keys.shape[1], _PROMPT_CHUNK):
            chunk = slice(begin, min(begin + _PROMPT_CHUNK, keys.shape[1]))
            kept = keys[:, chunk].gather(-1, channels[:, chunk])
            kept = kept.to(stored_as or kept.dtype).float() - mean
            encode_labels(kept, self.layout, out=self.rows[layer, :, first + chunk.start : first + chunk.stop])

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

    def layer(self, layer: int) -> LabelRows:
        """One layer's labels, as the kernel that takes in a new token wants them."""
        return LabelRows(self.rows[layer], self.layout, self._channels[layer], self._mean[layer], self.starts)

    def scores(
        self, layer: int, query: Tensor, lengths: Tensor, max_length: int, scaling: float, weights: bool = False
    ) -> Tensor:
        """Scores of every token for every KV head, as `group_scores` gives them.

        Args:
            layer: Whose labels.
            query: Rotated queries `[B, H, D]`, any float dtype.
            lengths: Tokens to score of each sequence, `[B]` int64 on the device.
            max_length: At least every entry of `lengths`.
            scaling: Factor of the attention scores.
            weights: Attention weights, also with one query head per KV head.

        Returns:
            `[B, Hkv, max_length]` float32. With several query heads per KV head, or with
            `weights`: the heads' softmax over the tokens, summed, and 0 at and beyond
            `lengths`. Else the scores, and -inf there.
        """
        return group_scores(
            *(self.rows[layer], self.layout, query, self._channels[layer], self.starts, lengths, max_length, scaling),
            weights=weights,
        )
