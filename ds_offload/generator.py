"""`OffloadedGenerator`: the Python face of the runtime."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ds_offload.calibration import Calibration, find_or_make_calibration
from ds_offload.config import HOT_SETS, OffloadConfig
from ds_offload.decode import DecodeLoop
from ds_offload.decoder import DecoderStack
from ds_offload.dtypes import QUANTISED_BITS, dtype_name
from ds_offload.errors import InputError
from ds_offload.generation import GenerationOutput, Sequence
from ds_offload.kv_context import KVContext
from ds_offload.loading import LoadedModel
from ds_offload.memory.kept_blocks import KeptBlocks
from ds_offload.memory.plan import MemoryPlan
from ds_offload.memory_check import check_request, memory_limits, settle_config
from ds_offload.monitor import FidelityMonitor
from ds_offload.notices import notice, warn
from ds_offload.open_session import load_session, read_document
from ds_offload.planning.request import memory_text, weight_bytes
from ds_offload.prefetch.streams import Faults
from ds_offload.prefill import ProgressCallback, prefill
from ds_offload.prefill_checkpoint import PrefillCheckpoint
from ds_offload.preparation import PreparedModel, encode_checked, room_of
from ds_offload.prompts import is_batch
from ds_offload.sampling import SamplingParams
from ds_offload.session import Session
from ds_offload.statistics import RunStatistics
from ds_offload.step_trace import StepTrace


class OffloadedGenerator:
    """Generates with the KV cache in host memory; one model on one device.

    Use it as a context manager, or call `close` when done, with its sessions first. One call runs at a time.

    Attributes:
        config: The configuration with everything the model decides filled in.
        loaded: Model, tokenizer and where they came from.
        last_output: What the last `stream` gave, once it has ended.
        faults: For the tests of the hand-overs.
        kept: Page-locked memory that one call leaves for the next; its `release` gives it back.
    """

    def __init__(self, loaded: LoadedModel, config: OffloadConfig, faults: Faults | None = None) -> None:
        """Wrap a loaded model; `config` is resolved. Users call `from_pretrained`."""
        self.loaded = loaded
        self.config = config
        self.decoder = DecoderStack(loaded.model)
        self.last_output: GenerationOutput | None = None
        self.faults = faults
        self.kept = KeptBlocks()
        # Where nobody calls `close`.
        weakref.finalize(self, self.kept.close)
        self._calibration: Calibration | None = None
        # Said once the first prompt has passed its checks: a refused one ends in one line.
        self._announcements: list[str] = []
        # Chosen anew for each call.
        self._open: dict[str, Any] = {"hot_set": None} if config.hot_set is None else {}
        if config.kv_dtype == "auto":
            self._open["kv_dtype"] = "auto"
        if config.calibration is not None:
            self._calibration = find_or_make_calibration(loaded, self.decoder, config.calibration)

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
        """The model's tokenizer; None where its folder has none."""
        return self.loaded.tokenizer

    def __enter__(self) -> OffloadedGenerator:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the weights, and of the memory that calls left for the next one."""
        self.kept.close()
        del self.decoder
        del self.loaded
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
        sequences = self._sequences(prompts, SamplingParams(**sampling))
        kept = self._checkpoint(checkpoint, sequences)
        statistics = RunStatistics(self.decoder, self.config)
        with StepTrace(trace, self.decoder.device) as steps:
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
        sequence = self._sequences([prompt], SamplingParams(**sampling))[0]
        kept = self._checkpoint(checkpoint, [sequence])
        return self._stream(sequence, on_progress, StepTrace(trace, self.decoder.device), kept)

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
            self._settle(lengths, capacities, False)
            if self.config.kv_dtype in QUANTISED_BITS:
                check_request(self.loaded, self.config, lengths, capacities, kept=self.kept.nbytes)
                calibration = self.calibrated(sequences[0].prompt)
        prompts = [sequence.prompt for sequence in sequences]
        return PrefillCheckpoint.of(folder, prompts, self.loaded.model, self.config, calibration)

    def chooses(self, field: str) -> bool:
        """Whether `field` of the config was left open, to be chosen anew for each call."""
        return field in self._open

    def _settle(self, lengths: list[int], capacities: list[int], continued: bool, kv_dtype: str | None = None) -> None:
        """Choose the K/V dtype and the hot set of this call, where the user left them open."""
        if not self._open:
            return
        given = {} if kv_dtype is None else {"kv_dtype": kv_dtype}
        asked = dataclasses.replace(self.config, **self._open | given)
        source, device = self.loaded.source, self.loaded.device
        before, kept = self.config.kv_dtype, self.kept.nbytes
        self.config = settle_config(source, asked, device, lengths, capacities, weight_bytes(source), continued, kept)
        stored, own = self.config.kv_dtype, dtype_name(source.dtype)
        if asked.kv_dtype == "auto" and stored not in (before, own):
            self._announcements.append(f"K/V are stored as {stored}: as {own} they do not fit the memory that is there")
        if "hot_set" not in self._open:
            return
        if self.config.kv_location == "host" and self.config.hot_set_multiple < HOT_SETS[0]:
            chosen, best = f"{self.config.hot_set_multiple:g}", f"{HOT_SETS[0]:g}"
            self._announcements.append(f"hot set: {chosen} x the budget, the most that fits; {best} x is faster")

    def plan_call(
        self, lengths: list[int], capacities: list[int], continued: bool = False, kv_dtype: str | None = None
    ) -> MemoryPlan:
        """Choose what the config leaves open, check that a call fits (`check_request`), and say what was chosen.

        Args:
            kv_dtype: What K/V are stored as already; None chooses it where it is open.
        """
        self._settle(lengths, capacities, continued, kv_dtype)
        kept = self.kept.nbytes
        plan = check_request(self.loaded, self.config, lengths, capacities, continued=continued, kept=kept)
        if kept:
            limit = memory_limits(self.config, self.loaded.device, 0, kept).host
            self.kept.trim(limit - plan.host_states)
        if plan.prefill_mode == "streamed":
            self._announcements.append("the prompt does not fit the GPU as a whole: its prefill is streamed")
        if plan.disk_kv:
            self._announcements.append(
                f"K/V are in files in {self.config.kv_dir}, {memory_text(plan.disk_kv)}: a row that is neither on the "
                "device nor in the page cache is a read of the disk"
            )
        while self._announcements:
            notice(self._announcements.pop(0))
        return plan

    def calibrated(self, prompt: list[int]) -> Calibration:
        """The model's calibration, found or made; of `prompt` where the model has no tokenizer."""
        if self._calibration is None:
            self._calibration = find_or_make_calibration(self.loaded, self.decoder, None, prompt)
        return self._calibration

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
            statistics.finish(context, loop.capture_s, monitor)


def _tokens(sequences: list[Sequence]) -> tuple[list[int], list[int]]:
    """Tokens of each prompt, and most tokens of each sequence."""
    lengths = [len(sequence.prompt) for sequence in sequences]
    return lengths, [length + sequence.limit for length, sequence in zip(lengths, sequences, strict=True)]
