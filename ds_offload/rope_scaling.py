"""RoPE scaling: which is applied, how far it reaches, and the user's override of it."""

from __future__ import annotations

import math
from typing import Any

from transformers import PreTrainedConfig

from ds_offload.errors import InputError

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")
OVERRIDES = ("linear", "dynamic", "yarn")
MOST_FACTOR = 1_000_000  # from 4,096 positions to 4 billion


def rope_type(config: PreTrainedConfig) -> str:
    """The kind of RoPE as transformers names it; "default" is RoPE without scaling."""
    return (config.rope_parameters or {}).get("rope_type", "default")


def partial_rotary(config: PreTrainedConfig) -> float | None:
    """Share of each head that is rotated, where the config states one; it may stand beside `rope_parameters`."""
    share = (config.rope_parameters or {}).get("partial_rotary_factor")
    return getattr(config, "partial_rotary_factor", None) if share is None else share


def original_context(config: PreTrainedConfig) -> int:
    """Positions the weights were trained for before any scaling."""
    if rope_type(config) in ("yarn", "llama3", "longrope"):
        return int(config.rope_parameters.get("original_max_position_embeddings") or config.max_position_embeddings)
    return int(config.max_position_embeddings)


def trained_context(config: PreTrainedConfig) -> int:
    """Positions the model claims, its RoPE scaling included.

    linear, dynamic and yarn stretch the original positions by their factor. llama3 and
    longrope checkpoints state the stretched length themselves, and so do those of yarn
    whose factor is null.
    """
    if rope_type(config) in OVERRIDES and config.rope_parameters.get("factor"):
        return int(original_context(config) * float(config.rope_parameters["factor"]))
    return int(config.max_position_embeddings)


def apply_rope_scaling(config: PreTrainedConfig, scaling: str) -> None:
    """Replace the config's RoPE scaling in place by "linear:4", "dynamic", "dynamic:2" or "yarn:4".

    The factor stretches the original positions. Call it before the model is built: rotary
    modules read the config once.

    Raises:
        InputError: Another kind, or a factor that is missing, under 1 or over `MOST_FACTOR`.
    """
    wrong = InputError(
        f"rope_scaling={scaling!r:.60} is not known; write linear:FACTOR, dynamic, dynamic:FACTOR or yarn:FACTOR "
        f"with a factor from 1 to {MOST_FACTOR:,}, such as yarn:4"
    )
    if not isinstance(scaling, str):
        raise wrong
    kind, colon, text = scaling.strip().lower().partition(":")
    if kind not in OVERRIDES or (not colon and kind != "dynamic"):
        raise wrong
    try:
        factor = float(text) if colon else 1.0
    except ValueError:
        raise wrong from None
    if not 1 <= factor <= MOST_FACTOR:
        raise wrong
    original = original_context(config)
    theta = config.rope_parameters["rope_theta"]
    parameters: dict[str, Any] = {"rope_type": kind, "factor": factor, "rope_theta": theta}
    share = partial_rotary(config)
    if share is not None:
        # Kept, so that the model is refused as it is without an override.
        parameters["partial_rotary_factor"] = share
    if kind == "yarn":
        parameters["original_max_position_embeddings"] = original
    config.rope_parameters = parameters
    # The dynamic kind stretches beyond max_position_embeddings, so there it stays the original length.
    config.max_position_embeddings = round(original * factor) if kind == "yarn" else original


def describe_rope(config: PreTrainedConfig, max_context: int) -> str | None:
    """The line for stderr when `max_context` is beyond the model's original positions, else None."""
    original, claimed, kind = original_context(config), trained_context(config), rope_type(config)
    if max_context <= original:
        return None
    name = config.name_or_path or "this model"
    line = f"max_context {max_context:,} is beyond the {original:,} positions {name} was trained for"
    if kind == "default":
        return (
            f"{line}; RoPE scaling applied: none (positions are extrapolated as they are); "
            f"--rope-scaling yarn:{math.ceil(max_context / original)} applies one"
        )
    line = f"max_context {max_context:,} is beyond the original {original:,} positions of {name}"
    factor = config.rope_parameters.get("factor")
    if factor is None and kind in ("yarn", "longrope"):
        factor = claimed / original
    line += f"; RoPE scaling applied: {kind}" + (f", factor {float(factor):g}" if factor is not None else "")
    if max_context > claimed and kind != "dynamic":
        return f"{line}, which reaches {claimed:,} positions; those beyond are extrapolated"
    return line
