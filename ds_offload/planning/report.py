"""The plan of a request as `ds-offload plan` shows it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from ds_offload.aliases import ALIASES, SHIPPED_MODELS
from ds_offload.calibration_file import check_calibration, has_codes
from ds_offload.config import SIZE_LIMIT, OffloadConfig
from ds_offload.dtypes import dtype_name
from ds_offload.errors import InputError
from ds_offload.families import check_supported
from ds_offload.loading import ModelSource, find_model
from ds_offload.memory.plan import MemoryPlan
from ds_offload.planning.changes import disk_instead, find_changes, kv_dir_hint, longest_context, settle
from ds_offload.planning.estimate import Estimate, estimate
from ds_offload.planning.request import Request, Shortage, host_total, memory_text
from ds_offload.planning.target import Target


@dataclass(frozen=True)
class PlanReport:
    """What a request takes on a target, and what would make it fit.

    Attributes:
        shortage: What does not fit, None where all does.
        estimate: Times and traffic.
        max_context: The longest context that fits with everything else as it is, 0 where none does.
        changes: Flags that make it fit; [] where it does or nothing helps.
        kv_dir_bytes: Bytes of a disk with which `kv_dir` alone makes it fit; None where it fits, or not even then.
    """

    request: Request
    target: Target
    plan: MemoryPlan
    shortage: Shortage | None
    estimate: Estimate
    max_context: int
    changes: list[str]
    kv_dir_bytes: int | None

    @classmethod
    def make(cls, request: Request, target: Target) -> PlanReport:
        """Plan `request` for `target`."""
        limits, asked = target.limits, request
        request = settle(asked, limits)
        plan = request.plan(limits.gpu)
        return cls(
            request=request,
            target=target,
            plan=plan,
            shortage=limits.shortage(plan),
            estimate=estimate(request, target.rates),
            max_context=longest_context(asked, limits),
            changes=find_changes(request, limits) or [],
            kv_dir_bytes=disk_instead(request, limits),
        )

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by use where the model runs; `total` is the peak.

        A step's workspace is among `buffers`. It and `hot_set` are never taken at the same
        time as `prefill`, so the parts may add up to more than `total`.
        """
        plan = self.plan
        return {
            "weights": plan.weights,
            "labels": plan.labels,
            "hot_set": plan.window + plan.hot_set,
            "buffers": plan.buffers + max(plan.decode, plan.turn),
            "prefill": plan.prefill,
            "reserve": plan.reserve,
            "total": plan.gpu_total,
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON. On a CPU the parts are the host's."""
        cuda, config = self.target.cuda, self.request.config
        host = {"kv": self.plan.host_kv, "disk": self.plan.disk_kv, "total": host_total(self.plan, cuda)}
        return {
            "model": self.request.source.name,
            "context": self.request.context,
            "batch": self.request.batch,
            "device": self.target.name,
            "fits": self.shortage is None,
            "gpu": self.parts if cuda else dict.fromkeys(self.parts, 0),
            "host": host if cuda else self.parts | host,
            "gpu_limit": self.target.limits.gpu,
            "host_limit": self.target.limits.host,
            "disk_limit": self.target.limits.disk,
            "kv_dtype": config.kv_dtype,
            "h2d_bytes_per_token": self.estimate.h2d_bytes_per_token,
            "prefill_s": self.estimate.prefill_s,
            "decode_ms_per_token": self.estimate.decode_ms_per_token,
            "max_context": self.max_context,
            "changes": self.changes,
            "kv_dir_bytes": self.kv_dir_bytes,
            "assumptions": self.estimate.assumptions
            | self._dtype_assumption()
            | {"prefill_mode": self.plan.prefill_mode},
            "config": config.to_dict(),
        }

    def text(self) -> str:
        """A table for people, and a line that says whether it fits."""
        request, limits, estimated = self.request, self.target.limits, self.estimate
        sequences = f"{request.batch} x {request.context:,} tokens"
        lines = [f"{request.source.name}, {dtype_name(request.source.dtype)}, {sequences}, on {self.target.name}"]
        place = "GPU" if self.target.cuda else "host"
        rows = [(f"{place} {name.replace('_', ' ')}", memory_text(size)) for name, size in self.parts.items()]
        if self.target.cuda:
            rows[-1] = (rows[-1][0], _of(self.plan.gpu_total, limits.gpu))
        else:
            del rows[-1]
        rows.append((f"host K/V, {request.config.kv_dtype}", memory_text(self.plan.host_kv)))
        if limits.disk is not None:
            rows.append((f"disk K/V, {request.config.kv_dtype}", _of(self.plan.disk_kv, limits.disk)))
        rows.append(("host total", _of(host_total(self.plan, self.target.cuda), limits.host)))
        rows.append(("over the link per token", memory_text(estimated.h2d_bytes_per_token)))
        if estimated.prefill_s is not None:
            rows.append(("prefill, estimated", f"{estimated.prefill_s:.2f} s"))
        if estimated.decode_ms_per_token is not None:
            rows.append(("decode, estimated", f"{estimated.decode_ms_per_token:.1f} ms a step"))
        rows.append(("longest context that fits", f"{self.max_context:,} tokens"))
        width = max(len(name) for name, _ in rows)
        lines += [f"  {name:<{width}}  {value}" for name, value in rows]
        reasons = [str(value) for value in estimated.assumptions.values() if str(value).startswith("none: ")]
        lines += [f"  not estimated: {reason.removeprefix('none: ')}" for reason in reasons]
        if self.plan.prefill_mode == "streamed":
            lines.append("  the prompt does not fit the GPU as a whole: its prefill is streamed")
        return "\n".join([*lines, self._verdict()])

    def _verdict(self) -> str:
        short = self.shortage
        if short is None:
            return "fits"
        needed, limit = memory_text(short.needed), memory_text(short.limit)
        line = f"does not fit: {needed} of {short.place} are needed and {limit} are there"
        files = kv_dir_hint(self.kv_dir_bytes)
        if self.changes:
            return f"{line}; add {' '.join(self.changes)}{files}"
        return f"{line}; no change makes it fit: {short.last_resort(self.request.config)}{files}"

    def _dtype_assumption(self) -> dict[str, str]:
        name = self.request.source.name
        if self.request.source.load_format != "dummy" or name in SHIPPED_MODELS:
            return {}
        dtype = dtype_name(self.request.source.dtype)
        return {"dtype": f"{dtype}, of a shape whose checkpoint was not read; --dtype says another"}


def find_source(name: str, load_format: str, dtype: str, rope_scaling: str | None) -> ModelSource:
    """A model's config and shape; of an alias what this package knows, without a network.

    Raises:
        InputError: As `find_model`.
    """
    if name in ALIASES and load_format == "auto" and not os.path.exists(name):
        load_format = "dummy"
        if name in SHIPPED_MODELS and dtype == "auto":
            # As it is converted (`default_model.py`).
            dtype = "fp32"
    return find_model(name, load_format=load_format, dtype=dtype, rope_scaling=rope_scaling)


def resolve_request(source: ModelSource, config: OffloadConfig, batch: int, cuda: bool) -> Request:
    """A request of `batch` sequences of the config's `max_context` tokens.

    Raises:
        InputError: The model cannot be run with this config or at this length, or `calibration` is none.
    """
    if config.calibration is not None:
        check_calibration(config.calibration)
    shape = source.shape
    resolved = config.resolve(
        head_dim=shape.head_dim,
        layers=shape.layers,
        trained_context=shape.trained_context,
        codes=has_codes(config.calibration),
    )
    request = Request(source, resolved, cuda, batch)
    check_supported(source.config, request.context)
    if batch * request.context >= SIZE_LIMIT:
        raise InputError(
            f"{batch:,} sequences of {request.context:,} tokens are 2^53 tokens or more; lower the batch or max_context"
        )
    return request


def _of(needed: int, limit: int | None) -> str:
    assert limit is not None
    return f"{memory_text(needed)} of {memory_text(limit)}"
