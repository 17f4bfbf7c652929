"""A prompt read in one piece, in turns or streamed, and all that is there behind it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ds_offload import OffloadConfig, OffloadedGenerator
from ds_offload.decode import DecodeLoop
from ds_offload.kv_context import KVContext
from ds_offload.prefetch.streams import Faults
from ds_offload.prefill import prefill

LENGTH, NEW = 150, 6
TOLERANCE = {"fp32": 2e-4, "bf16": 3e-2}


def make(folder: Path, device: str = "cpu", **changes: Any) -> OffloadedGenerator:
    config = {"max_context": 1024, "sink_tokens": 2, "recent_tokens": 4, "token_budget": 24, "segment_tokens": 16}
    return OffloadedGenerator.from_pretrained(str(folder), config=OffloadConfig(**config | changes), device=device)


class State:
    """A sequence behind its prefill: logits, rows of every layer, labels, window, and the tokens that follow."""

    def __init__(self, gen: OffloadedGenerator, context: KVContext, logits: torch.Tensor, length: int) -> None:
        self.logits = logits.cpu()
        if gen.decoder.device.type == "cuda":
            torch.cuda.synchronize()
        layers = range(gen.decoder.layers)
        self.rows = [torch.cat([p.cpu() for p in context.row_parts(n, 0, length)]) for n in layers]
        if context.codec is not None:
            heads = (gen.decoder.kv_heads, length)
            decode = context.codec.decode
            for n in (n for n in layers if n in context.store):
                out = torch.empty(*heads, 2, gen.decoder.head_dim, device=gen.decoder.device)
                coded = self.rows[n].unflatten(0, heads).to(out.device)
                self.rows[n] = decode(n, coded, out).flatten(0, 1).cpu()
        self.rows = [rows.float() for rows in self.rows]
        self.labels = context.labels.rows.cpu().clone()
        forced = context.window.forced_slots
        held = context.window_buffer
        self.window = (
            [held.tensor(n)[..., :forced, :, :].float().cpu().clone() for n in layers if n in context.store]
            if held
            else []
        )
        loop = DecodeLoop(gen.decoder, context)
        self.tokens = [int(logits.argmax())]
        for step in range(NEW):
            self.tokens.append(int(loop.step([self.tokens[-1]], [length + step + 1])[0].argmax()))

    def check(self, other: State, kv_dtype: str = "fp32") -> None:
        tolerance = TOLERANCE[kv_dtype]
        torch.testing.assert_close(self.logits, other.logits, rtol=tolerance, atol=tolerance * 10)
        for mine, others in zip([*self.rows, *self.window], [*other.rows, *other.window], strict=True):
            torch.testing.assert_close(mine, others, rtol=tolerance, atol=tolerance * 10)
        # A key near the border of two codes may fall on the other side.
        assert (self.labels != other.labels).float().mean() < (0.01 if kv_dtype == "fp32" else 0.2)
        assert self.tokens == other.tokens


@torch.no_grad()
def run(
    gen: OffloadedGenerator, ids: list[int], turns: list[int], streamed: bool = False, faults: Faults | None = None
) -> State:
    """Prefill `ids` in turns that end at `turns`."""
    if gen._calibration is None:
        gen.generate(ids[:20], max_new_tokens=1)
    assert gen._calibration is not None
    with KVContext(gen.decoder, gen.config, gen._calibration, [len(ids) + NEW], faults) as context:
        start = 0
        for stop in [*turns, len(ids)]:
            logits = prefill(gen.decoder, context, 0, ids[start:stop], start=start, streamed=streamed)
            start = stop
        return State(gen, context, logits, len(ids))
