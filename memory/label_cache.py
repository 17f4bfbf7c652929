"""The label cache: a few quantised channels of every key, the only thing on the device that grows with the context."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_offload.kernels.label_codec import LabelLayout, encode_labels
from ds_offload.kernels.label_scores import label_scores

# Tokens encoded at a time: their float32 copies are what a prompt's labels cost in workspace.
_PROMPT_CHUNK = 4096


class LabelCache:
    """Labels of B sequences, packed `[L, Hkv, N, row_bytes]` uint8 on the device, N tokens of all sequences in a row.

    Sequence b's token t stands at `starts[b] + t`, so unequal lengths waste nothing.
    A label is the key's kept channels less their mean over the calibration text (the
    mean adds the same to every score of a query, so it changes no ranking).

    Hand-overs: `append` runs on the current stream; scores on another stream must
    wait for an event recorded behind it.

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
        kept = channels[..., : layout.channels]
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

    def write_prompt(self, layer: int, sequence: int, start: int, keys: Tensor) -> None:
        """Encode keys `[Hkv, n, D]` as the labels of tokens `start` to `start + n` of `sequence`."""
        first = self._offsets[sequence] + start
        channels = self._channels[layer][:, None].expand(-1, keys.shape[1], -1)
        mean = self._mean[layer][:, None]
        for begin in range(0, keys.shape[1], _PROMPT_CHUNK):
            chunk = slice(begin, min(begin + _PROMPT_CHUNK, keys.shape[1]))
            kept = keys[:, chunk].gather(-1, channels[:, chunk]).float() - mean
            encode_labels(kept, self.layout, out=self.rows[layer, :, first + chunk.start : first + chunk.stop])

    def append(self, layer: int, positions: Tensor, keys: Tensor) -> None:
        """Encode keys `[B, Hkv, D]` as the labels of tokens `positions` `[B]` int64."""
        kept = keys.gather(-1, self._channels[layer].expand(len(keys), -1, -1)).float() - self._mean[layer]
        encoded = encode_labels(kept, self.layout)
        self.rows[layer].index_copy_(1, self.starts + positions, encoded.transpose(0, 1))

    def scores(self, layer: int, query: Tensor, lengths: Tensor, max_length: int, scaling: float) -> Tensor:
        """Scores `[B, H, max_length]` float32 of queries `[B, H, D]`; -inf at and beyond `lengths` `[B]`."""
        groups = query.shape[1] // self._channels.shape[1]
        channels = self._channels[layer].repeat_interleave(groups, 0).expand(len(query), -1, -1)
        kept = query.gather(-1, channels).float()
        return label_scores(self.rows[layer], self.layout, kept, self.starts, lengths, max_length, scaling)
