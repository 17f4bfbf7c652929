"""Random weights of a model's shape, made where they are used: for benchmarks."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ds_offload.model_shape import build_on_meta

SEED = 0
STD = 0.02


def build_dummy(config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A model with seeded random parameters of `dtype` on `device`, norms at 1 and biases at 0.

    Each parameter is allocated once on the device, a tied one once altogether. RoPE's
    buffers are those of a model built in the ordinary way.
    """
    model = build_on_meta(config, dtype)
    generator = torch.Generator(device).manual_seed(SEED)
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                values = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                if parameter.ndim > 1:
                    values.normal_(0.0, STD, generator=generator)
                else:
                    values.fill_(0.0 if name.endswith("bias") else 1.0)
                made[id(parameter)] = nn.Parameter(values, requires_grad=False)
            module._parameters[name] = made[id(parameter)]
    # Rotary buffers are not weights: building the module again, off meta, computes them.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config).to(device)
    left = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    assert not left, f"buffers without values: {left}"
    return model.eval()
