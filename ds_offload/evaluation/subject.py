"""What is evaluated: a loaded model, the configuration asked for, and its dense twin."""

from __future__ import annotations

import dataclasses
from functools import cached_property
from typing import Any

import torch

from ds_offload.calibration import Calibration, find_or_make_calibration
from ds_offload.config import OffloadConfig
from ds_offload.devices import resolve_device
from ds_offload.errors import InputError
from ds_offload.generator import OffloadedGenerator
from ds_offload.label_setting import label_layout, label_name
from ds_offload.memory.window import AttentionWindow
from ds_offload.memory_check import check_memory, settle_config
from ds_offload.notices import notice
from ds_offload.preparation import PreparedModel
from ds_offload.prompts import encode_prompt

# device type: tokens of a context, decode steps scored in it
DEFAULTS = {"cuda": (8192, 512), "cpu": (2048, 32)}


def dense_twin(config: OffloadConfig) -> OffloadConfig:
    """The same configuration with a budget of the whole context.

    It attends to everything and scores nothing. Its rows lie on the device, not in files: a
    hot set of the whole context would take the same memory, and the bits are the same.
    """
    changes: dict[str, Any] = {"token_budget": "1/1", "prefetch": "off", "hot_set": 1.0}
    return dataclasses.replace(config, **changes, kv_location="gpu", kv_dir=None)


def is_open(config: OffloadConfig) -> bool:
    """Whether free memory has yet to decide something; a context of K/V that are "auto" has the model's own dtype."""
    return config.hot_set is None or config.kv_dtype == "auto"


def kept_tokens(config: OffloadConfig, length: int) -> int:
    """Tokens that a KV head attends to at most in a context of `length` tokens."""
    window = AttentionWindow(config.sink_tokens, config.recent_tokens)
    return window.forced(length) + window.selected(config.budget.tokens(length), length)


def is_sparse(config: OffloadConfig, length: int) -> bool:
    """Whether something of a context of `length` tokens is left out."""
    return kept_tokens(config, length) < length


def check_sparse(config: OffloadConfig, length: int) -> None:
    """Refuse a configuration that leaves nothing out of `length` tokens: dense would be compared with dense.

    Raises:
        InputError: Naming the budget and the context.
    """
    if not is_sparse(config, length):
        raise InputError(
            f"token_budget={config.token_budget} with {config.sink_tokens} sinks and {config.recent_tokens} recent "
            f"tokens keeps all of a context of {length:,} tokens, so nothing sparse would be measured; lower "
            "--token-budget or give a longer context with --ctx"
        )


def check_layers(config: OffloadConfig, layers: int) -> None:
    """Refuse a configuration whose `layers` layers are all dense, as `check_sparse` refuses a budget of everything.

    Raises:
        InputError: Naming the dense layers.
    """
    if len(config.dense_layers) == layers:
        raise InputError(
            f"dense_layers names all {layers} layers of the model, so nothing sparse would be measured; "
            "leave one out of --dense-layers at least"
        )


def announce_window(config: OffloadConfig, length: int) -> None:
    """Say so where the budget of `length` tokens leaves nothing to select by label."""
    window = AttentionWindow(config.sink_tokens, config.recent_tokens)
    if not window.selected(config.budget.tokens(length), length):
        notice(
            f"token_budget={config.token_budget} of {length:,} tokens is no more than the sinks and the recent window: "
            "no token is selected by its label"
        )


def prepare(model: dict[str, Any], config: OffloadConfig, least: int = 0) -> PreparedModel:
    """Find and check the model; without a context length the device's default is taken.

    Args:
        model: Arguments of `PreparedModel.find` by name.
        least: Tokens that the default must have.

    Raises:
        InputError: Something given is wrong, or the model has no tokenizer.
    """
    default = max(DEFAULTS[resolve_device(model["device"]).type][0], least)
    prepared = PreparedModel.find(**model, config=config, default_context=default)
    if prepared.tokenizer is None:
        raise InputError(
            f"{prepared.source.name} has no tokenizer, and an evaluation reads texts; "
            "put tokenizer.json into the model's folder, or choose another model"
        )
    return prepared


class EvalSubject:
    """A model, evaluated under one configuration and densely.

    What can be refused without the weights is refused before they load: they do so at first use.

    Args:
        prepared: The model, found and checked; see `prepare`.

    Raises:
        InputError: Every layer is dense.

    Attributes:
        prepared: As given.
        config: The configuration asked for, resolved; see `settled`.
    """

    def __init__(self, prepared: PreparedModel) -> None:
        self.prepared = prepared
        self.config = prepared.config
        check_layers(self.config, prepared.source.shape.layers)
        self.config = self.settled(self.config)

    @property
    def context(self) -> int:
        """Most tokens of a context."""
        assert isinstance(self.config.max_context, int), "the config is resolved"
        return self.config.max_context

    @property
    def name(self) -> str:
        """What the user called the model."""
        return self.prepared.source.name

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self.prepared.device

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self.prepared.tokenizer

    def settled(self, config: OffloadConfig) -> OffloadConfig:
        """A resolved configuration with its K/V dtype and hot set chosen for the longest context, where open."""
        if not is_open(config):
            return config
        lengths = [max(1, self.context - 1)], [self.context]
        return settle_config(self.prepared.source, config, self.prepared.device, *lengths)

    @cached_property
    def sparse(self) -> OffloadedGenerator:
        """A generator of the configuration asked for; the weights load here."""
        for line in self.prepared.announcements:
            notice(line)
        return OffloadedGenerator(self.prepared.load(), self.config)

    @cached_property
    def calibration(self) -> Calibration:
        """Which channels the labels keep: found, or made now."""
        return find_or_make_calibration(self.sparse.loaded, self.sparse.decoder, self.config.calibration)

    def encode(self, prompt: Any) -> list[int]:
        """Token ids of a text or of messages."""
        return encode_prompt(prompt, self.tokenizer, self.prepared.source.shape.vocab_size)

    def check_memory(self, prompt: int, capacity: int) -> None:
        """Refuse a context of `capacity` tokens, `prompt` of them prefilled, that does not fit densely or sparsely.

        Raises:
            MemoryPlanError: One of them does not.
        """
        for config in (dense_twin(self.config), self.config):
            check_memory(self.prepared.source, config, self.device, [prompt], [capacity])

    def close(self) -> None:
        """Let go of the weights."""
        if "sparse" in self.__dict__:
            self.__dict__.pop("sparse").close()

    def __enter__(self) -> EvalSubject:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def settings_line(config: OffloadConfig, density: float | None) -> str:
    """What the figures were measured with, in one line."""
    row_bytes = label_layout(config).row_bytes
    labels = label_name(config.label_code, config.label_channels, config.label_bits)
    share = "not measured" if density is None else f"{density:.4f}"
    return (
        f"budget {config.token_budget}; labels {labels}, "
        f"{row_bytes} bytes a token and KV head; K/V {config.kv_dtype}; prefetch {config.prefetch}; "
        f"mean density {share}"
    )
