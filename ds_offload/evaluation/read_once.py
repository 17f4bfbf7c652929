"""Prompts read once and answered twice: densely, and sparsely from a copy of their rows."""

from __future__ import annotations

import torch

from ds_offload.config import OffloadConfig
from ds_offload.context_copy import rewind, synchronize
from ds_offload.decode import DecodeLoop
from ds_offload.errors import MemoryPlanError
from ds_offload.evaluation.subject import EvalSubject, dense_twin
from ds_offload.generation import GenerationOutput, Sequence
from ds_offload.kv_context import KVContext
from ds_offload.memory_check import check_request
from ds_offload.notices import notice
from ds_offload.prefill import ProgressCallback, prefill
from ds_offload.preparation import check_room
from ds_offload.sampling import SamplingParams
from ds_offload.statistics import RunStatistics


class Answerer:
    """Greedy answers to one prompt after another; use as a context manager.

    All of them share one context, whose memory is locked and whose CUDA graph is captured once.

    Args:
        config: Resolved for the subject's model.
        longest: Tokens of the longest prompt.
        capacity: Most tokens of a prompt and its answer.

    Raises:
        MemoryPlanError: The context does not fit beside what is there.
    """

    def __init__(self, subject: EvalSubject, config: OffloadConfig, longest: int, capacity: int) -> None:
        self.config = config
        self._decoder, self._loaded = subject.sparse.decoder, subject.sparse.loaded
        self._plan = check_request(self._loaded, config, [longest], [capacity])
        self._context = KVContext(self._decoder, config, subject.calibration, [capacity])
        self._loop = DecodeLoop(self._decoder, self._context)
        self._statistics = RunStatistics(self._decoder, config)

    def __enter__(self) -> Answerer:
        return self

    def __exit__(self, *error: object) -> None:
        self._context.close()

    @property
    def copies(self) -> bool:
        """Whether a prompt's rows may be copied to or from the context: those that are quantised may not."""
        return self._context.codec is None

    def read(self, ids: list[int], on_progress: ProgressCallback | None = None) -> torch.Tensor:
        """Forget the last prompt and read this one; logits `[vocab]` of its last token."""
        self._begin()
        streamed = self._plan.prefill_mode == "streamed"
        return prefill(self._decoder, self._context, 0, ids, on_progress, streamed=streamed)

    def copy(self, source: Answerer, tokens: int) -> None:
        """Forget the last prompt and take over the one of `tokens` tokens that `source` has read."""
        self._begin()
        copy_prompt(self._context, source._context, tokens)

    def answer(
        self, ids: list[int], limit: int, logits: torch.Tensor, on_progress: ProgressCallback | None = None
    ) -> GenerationOutput:
        """At most `limit` tokens behind the prompt `ids`, which was read or copied; `logits` `[vocab]` of its last."""
        sequence = Sequence(ids, limit, SamplingParams(max_new_tokens=limit), self._loaded)
        statistics = self._statistics
        sequence.take(logits, False)
        statistics.prefilled()
        while sequence.finish_reason is None:
            logits = self._loop.step([sequence.tokens[-1]], [sequence.length])[0]
            length = sequence.length
            sequence.take(logits, False)
            statistics.stepped(self._context, [length])
            if on_progress is not None:
                on_progress("decode", len(sequence.tokens), sequence.limit)
        statistics.finish(self._context, self._loop.capture_s)
        return sequence.output(statistics.summary())

    def _begin(self) -> None:
        rewind(self._context, 0)
        self._context.scheduler.clear_traffic()
        self._statistics = RunStatistics(self._decoder, self.config)
        self._statistics.begin(self._plan)


class ReadOnce:
    """Answers prompts of at most `longest` tokens densely and sparsely; use as a context manager.

    A prompt's own attention is exact under any configuration, so its K/V are the same for both answers. It is read
    for the dense one; the sparse one gets a copy, unless K/V are quantised or the two do not fit together: then it is
    read again.

    Args:
        capacity: Most tokens of a prompt and its answer.

    Raises:
        MemoryPlanError: The dense one does not fit alone.
    """

    def __init__(self, subject: EvalSubject, longest: int, capacity: int) -> None:
        self._subject, self._sizes = subject, (longest, capacity)
        self._dense: Answerer | None = None
        self._sparse: Answerer | None = None

    def __enter__(self) -> ReadOnce:
        self._dense = Answerer(self._subject, dense_twin(self._subject.config), *self._sizes)
        try:
            if self._dense.copies:
                self._sparse = Answerer(self._subject, self._subject.config, *self._sizes)
            else:
                notice("quantised K/V cannot be copied: every prompt is read twice, once for each answer")
        except MemoryPlanError:
            notice("the dense and the sparse context do not fit together: every prompt is read twice")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for answerer in (self._sparse, self._dense):
            if answerer is not None:
                answerer.__exit__()
        self._dense = self._sparse = None

    @torch.no_grad()
    def answer(
        self, ids: list[int], max_new_tokens: int, on_progress: ProgressCallback | None = None
    ) -> tuple[GenerationOutput, GenerationOutput]:
        """Greedy answers to one prompt, densely and sparsely.

        Raises:
            InputError: A prompt longer than the context.
            MemoryPlanError: One of the two does not fit alone.
        """
        check_room(ids, self._subject.config, "prompt")
        limit = min(max_new_tokens, self._subject.context - len(ids))
        if self._sparse is not None:
            assert self._dense is not None, "the context manager is entered"
            logits = self._dense.read(ids, on_progress)
            self._sparse.copy(self._dense, len(ids))
            dense = self._dense.answer(ids, limit, logits, on_progress)
            return dense, self._sparse.answer(ids, limit, logits, on_progress)
        self.__exit__()
        outputs = []
        for config in (dense_twin(self._subject.config), self._subject.config):
            with Answerer(self._subject, config, *self._sizes) as answerer:
                outputs.append(answerer.answer(ids, limit, answerer.read(ids, on_progress), on_progress))
        return outputs[0], outputs[1]


def copy_prompt(target: KVContext, source: KVContext, tokens: int) -> None:
    """Give `target`, which is empty, the first `tokens` tokens of `source`, as a prefill hands them over.

    Both are of one sequence, and rows are not quantised. Labels are made from the rows. Waits for the device.
    """
    target.prepare(0, tokens)
    target.reserve(0, tokens)
    source.streams.join()
    synchronize(source)
    for layer in range(source.layers):
        dtype, shape = source.stored_as(layer, tokens)
        with target.streams.producing("leaving", layer):
            rows = torch.empty(shape, dtype=dtype, device=source.store.device)
            source.read_rows(layer, 0, 0, rows)
        target.write_prompt(layer, 0, target.streams.lend(rows, "writer"), start=0, staging=layer % 2)
    target.streams.join()
