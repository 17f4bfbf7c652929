"""Whose a prefill is: what must agree where another goes on with its layers."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

from transformers import PreTrainedModel

from ds_offload.calibration_file import Calibration
from ds_offload.config import OffloadConfig
from ds_offload.dtypes import QUANTISED_BITS, dtype_name
from ds_offload.fingerprint import fingerprint


@dataclass(frozen=True)
class PrefillIdentity:
    """What two prefills must share for one to take up the other's layers.

    Attributes:
        prompt: SHA-256 of the token ids.
        model: The model's fingerprint.
        dtype, kv_dtype: Of the model, and of stored K/V.
        rope: The model's RoPE.
        caches: What labels and codes of quantised K/V, which cannot be made again, were made
            with; empty where K/V are not quantised.
        tokens, layers: Of the prompt and of the model.
    """

    prompt: str
    model: str
    dtype: str
    kv_dtype: str
    rope: str
    caches: str
    tokens: int
    layers: int

    @classmethod
    def of(
        cls, ids: list[int], model: PreTrainedModel, config: OffloadConfig, calibration: Calibration | None = None
    ) -> PrefillIdentity:
        """The identity of a prompt's prefill by `model`; `config` is resolved, its K/V dtype chosen.

        Args:
            calibration: The model's, where K/V are quantised.
        """
        digest = hashlib.sha256(json.dumps(ids).encode()).hexdigest()
        rope = json.dumps(model.config.rope_parameters, sort_keys=True, default=str)
        kv_dtype = str(config.kv_dtype)
        layers = model.config.num_hidden_layers
        caches = ""
        if config.kv_dtype in QUANTISED_BITS:
            assert calibration is not None, "quantised K/V need one"
            caches = _caches(config, calibration)
        return cls(digest, fingerprint(model), dtype_name(model.dtype), kv_dtype, rope, caches, len(ids), layers)

    def differences(self, found: PrefillIdentity) -> str:
        """What of another prefill differs: "prompt (900 tokens, here 901 tokens), kv_dtype (bf16, here fp32)"."""
        there, here = asdict(found), asdict(self)
        named = []
        for field in ("prompt", "model", "dtype", "kv_dtype", "rope", "caches"):
            if there[field] != here[field]:
                pair = (there[field], here[field])
                if field == "prompt":
                    pair = (f"{found.tokens:,} tokens", f"{self.tokens:,} tokens")
                elif field == "model":
                    pair = (f"fingerprint {found.model[:8]}", self.model[:8])
                named.append(f"{field} ({pair[0]}, here {pair[1]})")
        return ", ".join(named)


def _caches(config: OffloadConfig, calibration: Calibration) -> str:
    """The settings of labels and window, and of which layers have them, and a digest of the calibration."""
    names = ("label_code", "label_bits", "label_channels", "sink_tokens", "recent_tokens", "dense_layers")
    settings = ", ".join(f"{name}={getattr(config, name)}" for name in names)
    digest = hashlib.sha256()
    codes = calibration.codes.tensors() if calibration.codes is not None else ()
    for tensor in (calibration.channels, calibration.key_mean, calibration.key_factor, *codes):
        digest.update(tensor.contiguous().numpy().tobytes())
    return f"{settings}, calibration {digest.hexdigest()[:8]}"
