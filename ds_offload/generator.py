"""`OffloadedGenerator`: the Python face of the runtime."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ds_offload.call_planner import CallPlanner
from ds_offload.config import OffloadConfig
from ds_offload.decode import DecodeLoop
from ds_offload.dtypes import QUANTISED_BITS
from ds_offload.errors import InputError
from ds_offload.generation import GenerationOutput, Sequence
from ds_offload.kv_context import KVContext
from ds_offload.loading import LoadedModel
from ds_offload.memory_check import check_request
from ds_offload.monitor import FidelityMonitor
from ds_offload.notices import notice, warn
from ds_offload.open_session import begin_conversation, load_session, read_document
from ds_offload.prefetch.streams import Faults
from ds_offload.prefill import ProgressCallback, prefill
from ds_offload.prefill_checkpoint import PrefillCheckpoint
from ds_offload.preparation import PreparedModel, encode_checked, room_of
from ds_offload.prompts import is_batch
from ds_offload.sampling import SamplingParams
from ds_offload.session import Session
from ds_offload.statistics import RunStatistics
from ds_offload.step_trace import StepTrace


class OffloadedGenerator(CallPlanner):
    """Generates with the KV cache in host memory; one model on one device.

    Use it as a context manager, or call `close` when done, with its sessions first. One call runs at a time;
    threads that call at once take a generator each.

    Attributes:
        config: The configuration with everything the model decides filled in.
        loaded: Model, tokenizer and where they came from.
        last_output: What the last `stream` gave, once it has ended.
        faults: For the tests of the hand-overs.
        kept: Page-locked memory that one call leaves for the next; its `release` gives it back.
    """

    def __init__(self, loaded: LoadedModel, config: OffloadConfig, faults: Faults | None = None) -> None:
        """Wrap a loaded model; `config` is resolved. Users call `from_pretrained`."""
        super().__init__(loaded, config)
        self.last_output: GenerationOutput | None = None
        self.faults = faults

    @classmethod
    def from_pretrained(
        cls,
        name: str = "smollm2-135m",
        *,
        config: OffloadConfig | None = None,
        load_format: str = "auto",
        device: str = "auto",
        dtype: str = "auto",
        rope_scaling: str | None = None,
    ) -> OffloadedGenerator:
        """Find, check and load a model.

        Args:
            name: An alias, a hub id, a folder of safetensors, or a .gguf file.
            config: None is `OffloadConfig()`.
            load_format: "auto", or "dummy" for random weights of that shape.
            device: "auto", "cuda", "cuda:N" or "cpu".
            dtype: "auto" (the checkpoint's own), "bf16", "fp16" or "fp32".
            rope_scaling: Overrides the model's, such as "yarn:4", "linear:2" or "dynamic".

        Raises:
            InputError: Something given is wrong, not supported, or does not fit.
        """
        if config is not None and not isinstance(config, OffloadConfig):
            raise InputError(f"config={config!r} is no OffloadConfig; give OffloadConfig(max_context='8k')")
        return cls.from_prepared(
            PreparedModel.find(name, config or OffloadConfig(), load_format, device, dtype, rope_scaling)
        )

    @classmethod
    def from_prepared(cls, prepared: PreparedModel) -> OffloadedGenerator:
        """Load the weights of a model that was found and checked."""
        generator = cls(prepared.load(), prepared.config)
        generator._announcements.extend(prepared.announcements)
        if prepared.device.type == "cuda" and not generator.decoder.capturable:
            generator._announcements.append("a mixture of experts decodes without a CUDA graph, which is slower")
        return generator

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer; None where its folder has none. InputError once the generator is closed."""
        self.check_open()
        return self.loaded.tokenizer

    def __enter__(self) -> OffloadedGenerator:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the weights, and of the memory that calls left for the next one; once more does nothing."""
        self.kept.close()
        for held in ("decoder", "loaded"):
            self.__dict__.pop(held, None)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def generate(
        self,
        prompt: Any,
        *,
        output_logits: bool = False,
        on_progress: ProgressCallback | None = None,
        trace: str | Path | None = None,
        checkpoint: str | Path | None = None,
        **sampling: Any,
    ) -> Any:
        """Answer one prompt, or each prompt of a batch.

        Args:
            prompt: A text (tokenised as it is), a list of messages (through the chat
                template), a list of token ids, or a list of any of these.
            output_logits: Keep the logits every new token was chosen from.
            on_progress: Called with (phase, tokens done, tokens), phase "prefill" or "decode".
            trace: File for a Chrome trace of a few decode steps; see `StepTrace`.
            checkpoint: Folder where one prompt's prefill is kept while it lasts, and gone on
                with if it was killed; see `PrefillCheckpoint`.
            **sampling: Fields of `SamplingParams`: `max_new_tokens`, `temperature`
                (0 is greedy, the default), `top_k`, `top_p`, `min_p`,
                `repetition_penalty`, `stop`, `seed`.

        Returns:
            A `GenerationOutput`, or a list of them for a batch.

        Raises:
            InputError: An empty or too long prompt, a sampling value out of range, or a
                checkpoint that is not this prefill's.
        """
        prompts = list(prompt) if is_batch(prompt) else [prompt]
        params = SamplingParams(**sampling)
        sequences = self._sequences(prompts, params)
        kept = self._checkpoint(checkpoint, sequences)
        statistics = RunStatistics(self.decoder, self.config)
        with StepTrace(trace, self.decoder.device, int(params.max_new_tokens)) as steps:
            for _ in self._run(sequences, statistics, output_logits, on_progress, steps, kept):
                pass
        monitored = statistics.summary()["monitor"]
        if monitored is not None and monitored["warning"] is not None:
            warn(monitored["warning"])
        outputs = [sequence.output(statistics.summary()) for sequence in sequences]
        return outputs if is_batch(prompt) else outputs[0]

    def prefill(
        self, document: Any, *, on_progress: ProgressCallback | None = None, checkpoint: str | Path | None = None
    ) -> Session:
        """Read a document once, for any number of questions: a text or a list of token ids.

        `on_progress` and `checkpoint` are as in `generate`.

        Raises:
            InputError: An empty or too long document, or one that does not fit.
        """
        return read_document(self, document, on_progress, checkpoint)

    def converse(self, system: str | None = None) -> Session:
        """A conversation without a document, by the chat template; InputError where the model has none."""
        return begin_conversation(self, system)

    def load_session(self, path: str | Path) -> Session:
        """A session that `Session.save` wrote to `path`; InputError where that is damaged or of another model."""
        return load_session(self, path)

    def stream(
        self,
        prompt: Any,
        *,
        on_progress: ProgressCallback | None = None,
        trace: str | Path | None = None,
        checkpoint: str | Path | None = None,
        **sampling: Any,
    ) -> Iterator[str]:
        """Answer one prompt piece by piece; `last_output` holds the whole when the iterator ends.

        Takes what `generate` takes. Closing the iterator early frees the cache. A warning of
        the monitor would break into the text; it is in `last_output.stats["monitor"]`.

        Raises:
            InputError: As `generate`, at the call, before the first piece.
        """
        if is_batch(prompt):
            raise InputError("stream takes one prompt, and a batch was given; use generate for a batch")
        params = SamplingParams(**sampling)
        sequence = self._sequences([prompt], params)[0]
        kept = self._checkpoint(checkpoint, [sequence])
        steps = StepTrace(trace, self.decoder.device, int(params.max_new_tokens))
        return self._stream(sequence, on_progress, steps, kept)

    def _stream(
        self,
        sequence: Sequence,
        on_progress: ProgressCallback | None,
        trace: StepTrace,
        kept: PrefillCheckpoint | None,
    ) -> Iterator[str]:
        statistics = RunStatistics(self.decoder, self.config)
        with trace as steps:
            for pieces in self._run([sequence], statistics, False, on_progress, steps, kept):
                if pieces[0]:
                    yield pieces[0]
        self.last_output = sequence.output(statistics.summary())

    def _sequences(self, prompts: list[Any], params: SamplingParams) -> list[Sequence]:
        self.check_open()
        if not prompts:
            raise InputError("the batch is empty; give at least one prompt")
        room = room_of(self.config)
        assert isinstance(params.max_new_tokens, int)
        sequences = []
        for prompt in prompts:
            ids = encode_checked(prompt, self.tokenizer, self.loaded.source, self.config)
            limit = min(params.max_new_tokens, room - len(ids))
            if limit < params.max_new_tokens:
                notice(f"max_context={room:,} leaves room for {limit:,} new tokens, not {params.max_new_tokens:,}")
            sequences.append(Sequence(ids, limit, params, self.loaded))
        return sequences

    def _checkpoint(self, folder: str | Path | None, sequences: list[Sequence]) -> PrefillCheckpoint | None:
        lengths, capacities = _tokens(sequences)
        calibration = None
        if folder is not None and len(sequences) == 1:
            self.settle(lengths, capacities, False)
            if self.config.kv_dtype in QUANTISED_BITS:
                check_request(self.loaded, self.config, lengths, capacities, kept=self.kept.nbytes)
                calibration = self.calibrated(sequences[0].prompt)
        prompts = [sequence.prompt for sequence in sequences]
        return PrefillCheckpoint.of(folder, prompts, self.loaded.model, self.config, calibration)

    @torch.no_grad()
    def _run(
        self,
        sequences: list[Sequence],
        statistics: RunStatistics,
        keep_logits: bool,
        on_progress: ProgressCallback | None,
        trace: StepTrace,
        kept: PrefillCheckpoint | None,
    ) -> Iterator[list[str]]:
        """Prefill every sequence, then decode them together; yields each step's new text per sequence."""
        lengths, capacities = _tokens(sequences)
        plan = self.plan_call(lengths, capacities)
        streamed = plan.prefill_mode == "streamed"
        calibration = self.calibrated(sequences[0].prompt)
        statistics.begin(plan)
        with KVContext(self.decoder, self.config, calibration, capacities, self.faults, self.kept) as context:
            pieces = []
            for number, sequence in enumerate(sequences):
                ids = sequence.prompt
                # The answer's first tokens have their place before decoding begins: pinning it would hold up a step.
                room = min(capacities[number], len(ids) + int(self.config.segment_tokens))
                context.prepare(number, room)
                logits = prefill(self.decoder, context, number, ids, on_progress, streamed=streamed, checkpoint=kept)
                context.reserve(number, room)
                pieces.append(sequence.take(logits, keep_logits))
            statistics.prefilled()
            yield pieces
            self.check_open()
            loop, monitor = DecodeLoop(self.decoder, context), FidelityMonitor(self.decoder, self.config)
            longest = max(sequence.limit for sequence in sequences)
            while any(sequence.finish_reason is None for sequence in sequences):
                # A finished sequence repeats its last step: it writes the same row at the same place.
                tokens = [sequence.tokens[-1] for sequence in sequences]
                lengths = [sequence.length for sequence in sequences]
                logits = loop.step(tokens, lengths)
                running = [n for n, sequence in enumerate(sequences) if sequence.finish_reason is None]
                pieces = [""] * len(sequences)
                for n in running:
                    pieces[n] = sequences[n].take(logits[n], keep_logits)
                statistics.stepped(context, lengths, monitor.seconds)
                monitor.stepped(context, loop, lengths, running)
                trace.step()
                if on_progress is not None:
                    on_progress("decode", max(len(sequence.tokens) for sequence in sequences), longest)
                yield pieces
                self.check_open()
            statistics.finish(context, loop.capture_s, monitor)


def _tokens(sequences: list[Sequence]) -> tuple[list[int], list[int]]:
    """Tokens of each prompt, and most tokens of each sequence."""
    lengths = [len(sequence.prompt) for sequence in sequences]
    return lengths, [length + sequence.limit for length, sequence in zip(lengths, sequences, strict=True)]
