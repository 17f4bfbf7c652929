"""A prompt read once and answered twice: densely, and sparsely from a copy of its rows."""

from __future__ import annotations

import torch

from ds_offload.config import OffloadConfig
from ds_offload.context_copy import synchronize
from ds_offload.decode import DecodeLoop
from ds_offload.errors import MemoryPlanError
from ds_offload.evaluation.subject import EvalSubject, dense_twin
from ds_offload.generation import GenerationOutput, Sequence
from ds_offload.kv_context import KVContext
from ds_offload.memory.plan import MemoryPlan
from ds_offload.memory_check import check_request
from ds_offload.prefill import ProgressCallback, prefill
from ds_offload.preparation import check_room
from ds_offload.sampling import SamplingParams
from ds_offload.statistics import RunStatistics


@torch.no_grad()
def answer_twice(
    subject: EvalSubject, ids: list[int], max_new_tokens: int, on_progress: ProgressCallback | None = None
) -> tuple[GenerationOutput, GenerationOutput]:
    """Greedy answers to one prompt, densely and sparsely.

    A prompt's own attention is exact under any configuration, so its K/V are the same for
    both answers. It is read for the dense one; the sparse one gets a copy, unless K/V are
    quantised or the two do not fit together: then it is read again.

    Raises:
        InputError: A prompt longer than the context.
        MemoryPlanError: One of the two does not fit alone.
    """
    check_room(ids, subject.config, "prompt")
    params, limit = SamplingParams(max_new_tokens=max_new_tokens), min(max_new_tokens, subject.context - len(ids))
    dense, sparse = (Sequence(ids, limit, params, subject.sparse.loaded) for _ in range(2))
    capacities = [len(ids) + limit]
    twin, wanted = dense_twin(subject.config), subject.config
    decoder, loaded = subject.sparse.decoder, subject.sparse.loaded
    plan = check_request(loaded, twin, [len(ids)], capacities)
    with KVContext(decoder, twin, subject.calibration, capacities) as read:
        logits = prefill(decoder, read, 0, ids, on_progress, streamed=plan.prefill_mode == "streamed")
        first = _answer(subject, twin, plan, read, dense, logits, on_progress)
        room = _room_beside(subject, read, capacities)
        if room is not None:
            with KVContext(decoder, wanted, subject.calibration, capacities) as copied:
                copy_prompt(copied, read, len(ids))
                return first, _answer(subject, wanted, room, copied, sparse, logits, on_progress)
    plan = check_request(loaded, wanted, [len(ids)], capacities)
    with KVContext(decoder, wanted, subject.calibration, capacities) as context:
        logits = prefill(decoder, context, 0, ids, on_progress, streamed=plan.prefill_mode == "streamed")
        return first, _answer(subject, wanted, plan, context, sparse, logits, on_progress)


def copy_prompt(target: KVContext, source: KVContext, tokens: int) -> None:
    """Give `target`, which is empty, the first `tokens` tokens of `source`, as a prefill hands them over.

    Both are of one sequence, and rows are not quantised. Labels are made from the rows. Waits for the device.
    """
    target.prepare(0, tokens)
    target.reserve(0, tokens)
    source.streams.join()
    synchronize(source)
    for layer in range(target.layers):
        dtype, shape = source.stored_as(layer, tokens)
        with target.streams.producing("kv", layer):
            rows = torch.empty(shape, dtype=dtype, device=source.store.device)
            source.read_rows(layer, 0, 0, rows)
        target.write_prompt(layer, 0, target.streams.lend(rows, "writer"), start=0, staging=layer % 2)
    for staging in range(2):
        target.streams.wait("prompt_rows", staging)


def _room_beside(subject: EvalSubject, read: KVContext, capacities: list[int]) -> MemoryPlan | None:
    """The plan of the configuration asked for beside `read`; None where it does not fit or cannot have its rows."""
    if read.codec is not None:
        return None
    try:
        return check_request(subject.sparse.loaded, subject.config, capacities, capacities)
    except MemoryPlanError:
        return None


def _answer(
    subject: EvalSubject,
    config: OffloadConfig,
    plan: MemoryPlan,
    context: KVContext,
    sequence: Sequence,
    logits: torch.Tensor,
    on_progress: ProgressCallback | None,
) -> GenerationOutput:
    """Decode from a prompt's last logits."""
    decoder = subject.sparse.decoder
    statistics = RunStatistics(decoder, config)
    statistics.begin(plan)
    sequence.take(logits, False)
    statistics.prefilled()
    loop = DecodeLoop(decoder, context)
    while sequence.finish_reason is None:
        logits = loop.step([sequence.tokens[-1]], [sequence.length])[0]
        length = sequence.length
        sequence.take(logits, False)
        statistics.stepped(context, [length])
        if on_progress is not None:
            on_progress("decode", len(sequence.tokens), sequence.limit)
    statistics.finish(context, loop.capture_s)
    return sequence.output(statistics.summary())
