"""Which model families run, and by what name the others are refused."""

from __future__ import annotations

from transformers import PreTrainedConfig

from ds_offload.errors import InputError
from ds_offload.rope_scaling import ROPE_TYPES, partial_rotary, rope_type
from ds_offload.rope_scaling import describe_rope as describe_rope

SUPPORTED = {
    "llama": "Llama 2/3.x",
    "mistral": "Mistral",
    "mixtral": "Mixtral",
    "qwen2": "Qwen2/2.5",
    "qwen3": "Qwen3",
}

# What keeps other families out, where the config itself does not say it.
_ALIBI = ("bloom", "mpt")
_STATE_SPACE = ("rwkv", "xlstm", "recurrent_gemma", "lfm2", "minimax")
_SOFT_CAPPING = ("gemma2", "gemma3", "gemma3n")


def _supported_line() -> str:
    return f"supported are {', '.join(SUPPORTED.values())}"


def _obstacle(model_type: str, fields: dict) -> str | None:
    """What about another family's attention this runtime does not do, or None where it is only unknown."""
    attention = fields.get("attn_config")
    attention = attention if isinstance(attention, dict) else {}
    if fields.get("is_encoder_decoder"):
        return "encoder-decoder"
    recurrent = any(key.startswith(("mamba_", "ssm_", "linear_key_head")) for key in fields)
    if recurrent or "mamba" in model_type or model_type.startswith(_STATE_SPACE):
        return "state-space or recurrent layers"
    if fields.get("kv_lora_rank"):
        return "multi-head latent attention (MLA)"
    if fields.get("alibi") or attention.get("alibi") or model_type in _ALIBI:
        return "ALiBi positions"
    if fields.get("attn_logit_softcapping") or fields.get("final_logit_softcapping") or model_type in _SOFT_CAPPING:
        return "logit soft-capping"
    return None


def check_family(name: str, fields: dict) -> None:
    """Refuse a model that is not one of the supported families.

    Args:
        name: The model, as the user wrote it.
        fields: Its config.json, or `config.to_dict()`.

    Raises:
        InputError: Another family, a quantised checkpoint, or one that asks for its own code.
    """
    model_type = fields.get("model_type")
    if not isinstance(model_type, str):
        raise InputError(f"the config of {name} names no model_type; {_supported_line()}")
    if model_type not in SUPPORTED:
        obstacle = _obstacle(model_type, fields)
        what = f"of model type {model_type}" + (f" ({obstacle})" if obstacle else "")
        raise InputError(f"{name} is {what}, which is not supported; {_supported_line()}")
    quantised = fields.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else "unknown"
        raise InputError(
            f"{name} is a quantised checkpoint ({method}), which is not supported; "
            "use its bf16 or fp16 checkpoint, or a .gguf file"
        )
    if fields.get("auto_map"):
        raise InputError(
            f"{name} asks for its own code (auto_map in config.json), which is never run; "
            "use a checkpoint of a family that transformers has"
        )


def sliding_window(config: PreTrainedConfig) -> int | None:
    """Tokens of the sliding window that some layer uses, or None.

    transformers' cache keeps no more than that of a Llama, too, whose config states one (or `attention_chunk_size`).
    """
    window = getattr(config, "sliding_window", None)
    if window is None:
        window = getattr(config, "attention_chunk_size", None)
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None and config.model_type not in ("mistral", "mixtral"):
        return window if any(kind != "full_attention" for kind in layer_types) else None
    return window


def check_supported(config: PreTrainedConfig, max_context: int) -> None:
    """Refuse what this runtime would not compute as the model means it, up to `max_context` tokens.

    Raises:
        InputError: Another family, a sliding window in use at this length, partial rotary
            embeddings or an unknown kind of RoPE; names what is not supported and what is.
    """
    name = config.name_or_path or "this model"
    check_family(name, config.to_dict())
    window = sliding_window(config)
    if window is not None and max_context > window:
        raise InputError(
            f"{name} uses a sliding window of {window:,} tokens, which is not supported beyond it; "
            f"use max_context={window} or less, or a model with full attention"
        )
    if rope_type(config) not in ROPE_TYPES:
        raise InputError(f"{name} uses RoPE of kind {rope_type(config)!r}; supported are {', '.join(ROPE_TYPES)}")
    share = partial_rotary(config) or 1.0
    if float(share) != 1.0:
        raise InputError(
            f"{name} rotates only {float(share):g} of each head (partial_rotary_factor), which is not supported; "
            "use a model that rotates whole heads"
        )
