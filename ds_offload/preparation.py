"""A model found, checked and planned for, before its weights load."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import Any

import torch

from ds_offload.calibration_file import check_calibration, has_codes
from ds_offload.config import OffloadConfig
from ds_offload.devices import resolve_device
from ds_offload.errors import InputError, LoadError
from ds_offload.families import check_supported, describe_rope, sliding_window
from ds_offload.loading import LoadedModel, ModelSource, find_model, load_tokenizer, load_weights
from ds_offload.memory.plan import MemoryPlan
from ds_offload.memory_check import check_memory, check_weights
from ds_offload.prompts import encode_prompt


@dataclass(frozen=True)
class PreparedModel:
    """Everything about a model that can be known and refused without its weights.

    Attributes:
        source: Where it comes from, its config and shape.
        config: The user's configuration with everything the model decides filled in.
        device: Where it will run.
        tokenizer: None where the checkpoint has none.
        announcements: What a user must know of the choices made, a line each; to be
            said once the first prompt has passed its checks.
    """

    source: ModelSource
    config: OffloadConfig
    device: torch.device
    tokenizer: Any
    announcements: tuple[str, ...]

    @classmethod
    def find(
        cls,
        name: str,
        config: OffloadConfig,
        load_format: str,
        device: str,
        dtype: str,
        rope_scaling: str | None,
        default_context: int | None = None,
    ) -> PreparedModel:
        """Find a model and check all that was asked for; see `OffloadedGenerator.from_pretrained`.

        Args:
            default_context: `max_context` where the config leaves it open, or less where the model has less; None
                is all that the model was trained for.

        Raises:
            InputError: Something given is wrong, not supported, or does not fit.
        """
        if config.calibration is not None and not os.path.isfile(os.path.expanduser(config.calibration)):
            raise LoadError(
                f"calibration {config.calibration} is no file; make one with `ds-offload calibrate --out FILE`, "
                "or leave it out"
            )
        if config.calibration is not None:
            check_calibration(config.calibration)
        target = resolve_device(device)
        source = find_model(name, load_format=load_format, dtype=dtype, rope_scaling=rope_scaling)
        resolved = config.resolve(
            head_dim=source.shape.head_dim,
            layers=source.shape.layers,
            trained_context=source.shape.trained_context,
            codes=has_codes(config.calibration),
        )
        if config.max_context is None and default_context is not None:
            # Before the checks, which would refuse a sliding window that the default is within.
            most = min(room_of(resolved), sliding_window(source.config) or default_context)
            resolved = dataclasses.replace(resolved, max_context=min(default_context, most))
        assert isinstance(resolved.max_context, int)
        check_supported(source.config, resolved.max_context)
        check_weights(source, resolved, target)
        lines = [describe_rope(source.config, resolved.max_context)]
        if config.label_code == "auto" and config.label_bits is config.label_channels is None:
            lines.append(_scalar_labels(resolved))
        if target.type == "cpu" and config.gpu_memory is not None:
            lines.append("gpu_memory limits nothing on the CPU, where host_memory limits everything")
        if device == "auto" and target.type == "cpu":
            lines.insert(0, "no CUDA device found: running on the CPU")
        return cls(source, resolved, target, load_tokenizer(source), tuple(line for line in lines if line is not None))

    def encode(self, prompt: Any) -> list[int]:
        """Token ids of one prompt.

        Raises:
            InputError: It is empty, of no kind that is known, or leaves no room for an answer.
        """
        return encode_checked(prompt, self.tokenizer, self.source, self.config)

    def check(self, prompts: list[int], capacities: list[int]) -> MemoryPlan:
        """The memory plan of one call, before the weights load.

        Args:
            prompts: Tokens of each prompt.
            capacities: Most tokens of each sequence, prompt and answer.

        Raises:
            MemoryPlanError: It does not fit; names the smallest change that makes it fit.
        """
        return check_memory(self.source, self.config, self.device, prompts, capacities)

    def check_answer(self, ids: list[int], max_new_tokens: int) -> MemoryPlan:
        """`check` for one prompt and its answer of at most `max_new_tokens` tokens."""
        assert isinstance(self.config.max_context, int), "the config is resolved"
        return self.check([len(ids)], [min(len(ids) + max_new_tokens, self.config.max_context)])

    def load(self) -> LoadedModel:
        """Load the weights."""
        return load_weights(self.source, self.device, self.tokenizer)


def _scalar_labels(resolved: OffloadConfig) -> str | None:
    """Why labels are scalar though nobody asked for them; None where they are not."""
    if resolved.label_code == "product":
        return None
    why = "heads of this size have no product code"
    if not has_codes(resolved.calibration):
        why = f"the calibration {resolved.calibration} has no product codes; make one with `ds-offload calibrate`"
    return f"labels are {resolved.label_channels} x {resolved.label_bits} bit: {why}"


def encode_checked(prompt: Any, tokenizer: Any, source: ModelSource, config: OffloadConfig) -> list[int]:
    """Token ids of one prompt; see `PreparedModel.encode`."""
    ids = encode_prompt(prompt, tokenizer, source.shape.vocab_size)
    check_room(ids, config, "prompt")
    return ids


def check_room(ids: list[int], config: OffloadConfig, what: str) -> None:
    """Refuse token ids that leave no room for an answer.

    Raises:
        InputError: Calling them `what`.
    """
    room = room_of(config)
    if len(ids) >= room:
        raise InputError(
            f"the {what} has {len(ids):,} tokens and max_context={room:,} leaves no room for an answer; "
            f"shorten the {what} or raise max_context (--ctx)"
        )


def room_of(config: OffloadConfig) -> int:
    """Most tokens of a sequence; `config` is resolved."""
    assert isinstance(config.max_context, int), "the config is resolved"
    return config.max_context
