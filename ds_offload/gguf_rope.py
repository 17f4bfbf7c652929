"""The RoPE scaling that a .gguf file states, which transformers leaves out of the config it reads."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ds_offload.errors import InputError
from ds_offload.gguf_header import FREQUENCY_FACTORS, read_gguf_header

# Of every Llama from 3.1 on; only the factor differs.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_TYPE, _FACTOR, _ORIGINAL = "scaling.type", "scaling.factor", "scaling.original_context_length"
_OLD_FACTOR = "scale_linear"  # of files from before there were kinds of scaling
_BETAS = {"scaling.yarn_beta_fast": "beta_fast", "scaling.yarn_beta_slow": "beta_slow"}
_WITHOUT_EFFECT = {"scaling.finetuned"}


def take_rope_scaling(config: PreTrainedConfig, path: Path) -> None:
    """Give `config`, which transformers read from the file at `path`, the file's RoPE scaling, in place.

    Raises:
        InputError: A kind of scaling that is not known.
        LoadError: The file cannot be read.
    """
    header = read_gguf_header(path)
    prefix = f"{header.values['general.architecture']}.rope."
    stated = {name.removeprefix(prefix): value for name, value in header.values.items() if name.startswith(prefix)}
    parameters = _stated({name: value for name, value in stated.items() if name.startswith("scal")}, path)
    if header.frequency_factors is not None:
        factors = _of_llama3(config, torch.tensor(header.frequency_factors), path)
        if factors and parameters:
            raise InputError(
                f"{path} scales RoPE twice ({parameters['rope_type']}, and by {FREQUENCY_FACTORS}), "
                "which is not supported; use a folder of safetensors"
            )
        parameters |= factors
    config.rope_parameters = config.rope_parameters | parameters
    config.standardize_rope_params()


def _stated(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """RoPE parameters of the file's metadata, the keys without "ARCHITECTURE.rope."."""
    values = {name: value for name, value in values.items() if name not in _WITHOUT_EFFECT}
    factor = float(values.pop(_FACTOR, 0) or values.get(_OLD_FACTOR, 0))
    values.pop(_OLD_FACTOR, None)
    # As llama.cpp takes a factor that stands alone.
    kind = values.pop(_TYPE, "linear")
    original = values.pop(_ORIGINAL, None)
    if kind == "none" or (kind == "linear" and factor in (0, 1)):
        return {}
    parameters: dict[str, Any] = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        parameters |= {ours: float(values.pop(name)) for name, ours in _BETAS.items() if name in values}
        if original is not None:
            parameters["original_max_position_embeddings"] = int(original)
    unknown = {name: value for name, value in values.items() if value != 1.0}
    if kind not in ("linear", "yarn") or factor <= 0 or unknown:
        more = "".join(f", {name}={value}" for name, value in unknown.items())
        raise InputError(
            f"{path} scales RoPE in a way that is not supported ({kind}, factor {factor:g}{more}); "
            "use a folder of safetensors"
        )
    return parameters


def _of_llama3(config: PreTrainedConfig, factors: torch.Tensor, path: Path) -> dict[str, Any]:
    """RoPE parameters that divide the frequencies by `factors` `[D / 2]`."""
    if (factors == 1).all():
        return {}
    scaled = copy.deepcopy(config)
    scaled.rope_parameters |= {"rope_type": "llama3", "factor": factors.max().item()} | _LLAMA3
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](scaled, torch.device("cpu"))
    halves = torch.arange(len(frequencies)) / len(frequencies)
    expected = 1 / (frequencies * config.rope_parameters["rope_theta"] ** halves)
    if expected.shape != factors.shape or not torch.allclose(expected, factors, rtol=1e-3):
        raise InputError(
            f"{path} scales RoPE's frequencies in another way than Llama 3 ({FREQUENCY_FACTORS}), "
            "which is not supported; use a folder of safetensors"
        )
    return scaled.rope_parameters
