"""`OffloadConfig`: everything a user may set, checked and normalised in one place."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any, Literal

from ds_offload.errors import InputError
from ds_offload.given_path import check_path
from ds_offload.label_choice import check_labels, choose_labels

SIZE_LIMIT = 2**53  # below it floats, which times are estimated in, hold every size
KV_DTYPES = ("auto", "bf16", "fp16", "fp32", "int8", "int4")
TOP_P_CAP = Fraction(1, 4)
# By which `monitor="widen"` raises the budget, one after the other; memory is planned for the last.
WIDENINGS = (Fraction(3, 2), Fraction(2))
# What `hot_set` is chosen from, the largest that fits. At 4 x the budget a step of text finds 98 to 99 % of its rows on
# the device, at 2 x 94 to 98 %; more than 4 x gains little.
HOT_SETS = (4.0, 3.5, 3.0, 2.75, 2.5, 2.25, 2.0, 1.9, 1.8, 1.7, 1.6, 1.5, 1.4, 1.3, 1.2, 1.1, 1.0)

_TOKEN_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30}
_BYTE_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12} | {
    f"{prefix}{suffix}": 2**power
    for prefix, power in (("k", 10), ("m", 20), ("g", 30), ("t", 40))
    for suffix in ("", "ib")
}


def _parse_size(value: Any, units: dict[str, int], field: str, example: str) -> int:
    if isinstance(value, int) and abs(value) >= SIZE_LIMIT:
        raise InputError(f"{field} must be at least 1 and under 2^53; write {example}")
    text = str(value) if isinstance(value, int | str) and not isinstance(value, bool) else ""
    # A comma elsewhere than between thousands may be a decimal point.
    match = re.fullmatch(r"\s*(-?(?:\d{1,3}(?:,\d{3})+|\d+(?:_\d+)*)(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].lower() not in units:
        raise InputError(f"{field}={value!r:.60} is not a size; write {example}")
    unit = units[match[2].lower()]
    size = Fraction(Decimal(re.sub("[_,]", "", match[1]))) * unit  # `int` refuses more than 4,300 digits
    if size % 1 and unit == 1:  # 1.2M or 23.7GiB need not come to a whole number
        raise InputError(f"{field}={value!r:.60} is not a whole number; write {example}")
    if not 1 <= size < SIZE_LIMIT:
        raise InputError(f"{field}={value!r:.60} must be at least 1 and under 2^53; write {example}")
    return int(size)


def parse_tokens(value: int | str, field: str = "max_context", example: str = "") -> int:
    """A number of tokens: 4096, "256k" (x 1,024) or "1M" (x 1,048,576)."""
    return _parse_size(value, _TOKEN_UNITS, field, example or "a number of tokens such as 4096, 256k or 1M")


def parse_bytes(value: int | str, field: str = "gpu_memory") -> int:
    """A number of bytes: 24000000000, "24GiB", "24G" (both x 2^30) or "24GB" (x 10^9)."""
    return _parse_size(value, _BYTE_UNITS, field, "a number of bytes such as 24GiB or 24GB")


@dataclass(frozen=True)
class TokenBudget:
    """How many tokens each KV head keeps at a decode step, the forced ones included.

    Exactly one of the three is set: `count` tokens, a `fraction` of the context, or
    the smallest set whose label scores reach `top_p` of the attention, as calibration
    found them to do (at most `TOP_P_CAP` of the context).
    """

    count: int | None = None
    fraction: Fraction | None = None
    top_p: float | None = None

    @classmethod
    def parse(cls, value: int | float | str) -> TokenBudget:
        """Read a count (2048, "4k"), a fraction ("1/16", 0.25, "0.25") or "top-p:0.95"."""
        wrong = InputError(
            f"token_budget={value!r} is no budget; write a count of at least 1 such as 2048, "
            'a fraction over 0 and up to 1 such as 1/16, or "top-p:0.95"'
        )
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise wrong
        try:
            if isinstance(value, str):
                text = value.strip().lower()
                if text.startswith("top-p:"):
                    top_p = float(text.removeprefix("top-p:"))
                    if not 0 < top_p <= 1:
                        raise wrong
                    return cls(top_p=top_p)
                if "/" in text or "." in text:
                    fraction = Fraction(text)
                    if not 0 < fraction <= 1:
                        raise wrong
                    return cls(fraction=fraction)
            if isinstance(value, float):
                if not (math.isfinite(value) and 0 < value <= 1):
                    raise wrong
                return cls(fraction=Fraction(value).limit_denominator(1 << 20))
            return cls(count=parse_tokens(value, "token_budget"))
        except (ValueError, ZeroDivisionError):
            raise wrong from None

    def tokens(self, length: int) -> int:
        """The most tokens kept of a context of `length` tokens (at least 1)."""
        if self.count is not None:
            return min(self.count, length)
        share = self.fraction if self.fraction is not None else TOP_P_CAP
        return max(1, math.ceil(share * length))

    def scaled(self, factor: Fraction) -> TokenBudget:
        """A count or a fraction `factor` times as large, at most the whole context."""
        if self.count is not None:
            return TokenBudget(count=math.ceil(self.count * factor))
        assert self.fraction is not None, "a top-p budget has no size to scale"
        return TokenBudget(fraction=min(Fraction(1), self.fraction * factor))

    def __str__(self) -> str:
        if self.top_p is not None:
            return f"top-p:{self.top_p}"
        if self.fraction is not None:
            return f"{self.fraction.numerator}/{self.fraction.denominator}"
        return str(self.count)


@dataclass(frozen=True)
class OffloadConfig:
    """How a model decodes with its KV cache off the GPU. Set `max_context` and nothing else.

    Attributes:
        max_context: Most tokens of prompt and answer together (4096, "256k", "1M");
            None is what the model was trained for.
        token_budget: Tokens each KV head attends to per step, sinks, recent window and
            current token included: a count, a fraction ("1/16") or "top-p:0.95".
        label_code: What a key's label on the GPU is. "product" takes all its channels, in parts
            of four with one of 16 words each: 1/16 of a 16-bit key's bytes. "scalar" keeps
            `label_channels` of them at `label_bits`. "auto" is the first, and the second where one
            of these two is given, the calibration has no words or the head no whole parts.
        label_channels: Channels of every key kept by scalar labels; None spends 1/16 of a
            16-bit key's bytes, the scale counted, rounded up to 4 bytes.
        label_bits: Bits per kept channel: 16, 8, 4 or 2, None is 2. Below 16, scores take the
            query in 8 bits, which costs far less than the labels' own rounding.
        sink_tokens: First tokens of the context that are always attended.
        recent_tokens: Last tokens before the current one that are always attended.
        dense_layers: Layers whose K/V stay on the GPU and are attended in full.
        kv_location: "host" keeps the K/V in (pinned) host memory, "gpu" on the device.
        kv_dir: Folder for files that the K/V of "host" are kept in, for contexts beyond its memory;
            None keeps them in memory. What is not on the GPU or in the page cache is read from the disk then.
        kv_dtype: dtype of the stored K/V. "int8" and "int4" quantise them on their way to the
            store; sinks, recent window and dense layers stay in the model's dtype. "auto" is
            the first of the model's own, "int8" and "int4" that fits.
        prefetch: "off" (the query selects, what is missing is fetched in line), "exact"
            (the same, and rows that ranked next are fetched for the next step meanwhile)
            or "speculative" (a query predicted one layer ahead selects, as in the paper).
            Off and exact give the same tokens.
        hot_set: Rows kept on the GPU per layer and KV head, as a multiple of the budget;
            0 keeps none from step to step, None is the largest of `HOT_SETS` that fits.
        gpu_memory: Bytes of GPU memory to stay under ("24GiB"); None is what is free.
        host_memory: The same for the host.
        calibration: File made by `ds-offload calibrate`; None finds or makes one.
        segment_tokens: Tokens by which the host store grows.
        monitor: What to do while decoding where sparse attention, compared with exact attention
            now and then, captures too little: "warn" at the end, "widen" the budget (to twice
            its size, which is planned for) and warn if that is not enough, or "off" compares nothing.
        monitor_every: Decode steps from one comparison to the next, whatever they cost; None is
            as often as 1 % of the time allows.

    Raises:
        InputError: A value out of range, naming what was given and what is needed.
    """

    max_context: int | str | None = None
    token_budget: int | float | str = "1/16"
    label_code: Literal["auto", "product", "scalar"] = "auto"
    label_channels: int | None = None
    label_bits: int | None = None
    sink_tokens: int = 4
    recent_tokens: int = 64
    dense_layers: tuple[int, ...] = ()
    kv_location: Literal["host", "gpu"] = "host"
    kv_dir: str | None = None
    kv_dtype: str = "auto"
    prefetch: Literal["exact", "speculative", "off"] = "off"
    hot_set: float | None = None
    gpu_memory: int | str | None = None
    host_memory: int | str | None = None
    calibration: str | None = None
    segment_tokens: int | str = 1024
    monitor: Literal["warn", "widen", "off"] = "warn"
    monitor_every: int | None = None

    def __post_init__(self) -> None:
        def fix(field: str, value: Any) -> None:
            object.__setattr__(self, field, value)

        if self.max_context is not None:
            fix("max_context", parse_tokens(self.max_context))
        fix("token_budget", str(TokenBudget.parse(self.token_budget)))
        fix("segment_tokens", parse_tokens(self.segment_tokens, "segment_tokens"))
        for field in ("gpu_memory", "host_memory"):
            if getattr(self, field) is not None:
                fix(field, parse_bytes(getattr(self, field), field))
        for field in ("calibration", "kv_dir"):
            if getattr(self, field) is not None:
                fix(field, check_path(getattr(self, field), field))
        check_labels(self.label_code, self.label_bits, self.label_channels)
        self._one_of("kv_location", ("host", "gpu"))
        if self.kv_dir is not None and self.kv_location == "gpu":
            raise InputError(
                f"kv_dir={self.kv_dir!r} is for K/V on the host, and kv_location='gpu'; leave one of them out"
            )
        self._one_of("prefetch", ("exact", "speculative", "off"))
        self._one_of("kv_dtype", KV_DTYPES)
        self._at_least("sink_tokens", 0)
        self._at_least("recent_tokens", 0)
        self._check_hot_set()
        self._one_of("monitor", ("warn", "widen", "off"))
        if self.monitor_every is not None:
            self._at_least("monitor_every", 1)
        if self.monitor == "widen" and self.budget.top_p is not None:
            raise InputError(
                f"monitor='widen' raises a budget that is a count or a fraction, and token_budget={self.token_budget} "
                "is neither; use monitor='warn', or a budget such as 1/16"
            )
        layers = self.dense_layers
        if not isinstance(layers, tuple | list | set | range) or not all(
            isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in layers
        ):
            raise InputError(f"dense_layers={layers!r} must be layer numbers from 0, such as (0, 1)")
        fix("dense_layers", tuple(sorted(set(layers))))

    def _check_hot_set(self) -> None:
        given = self.hot_set
        if given is None:
            return
        if isinstance(given, bool) or not isinstance(given, int | float) or not (given == 0 or 1 <= given < 1e6):
            raise InputError(
                f"hot_set={given!r} must be a multiple of the budget of at least 1, such as 2, or 0 to keep no rows"
            )
        object.__setattr__(self, "hot_set", float(given))

    def _one_of(self, field: str, allowed: tuple[Any, ...]) -> None:
        if getattr(self, field) not in allowed:
            raise InputError(f"{field}={getattr(self, field)!r} must be one of {', '.join(map(str, allowed))}")

    def _at_least(self, field: str, least: int) -> None:
        value = getattr(self, field)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < SIZE_LIMIT:
            raise InputError(f"{field}={value!r:.60} must be a whole number of at least {least} and under 2^53")

    @property
    def hot_set_multiple(self) -> float:
        """`hot_set`, or where it is not chosen yet the least that it may become."""
        return self.hot_set if self.hot_set is not None else HOT_SETS[-1]

    @property
    def budget(self) -> TokenBudget:
        """`token_budget`, parsed."""
        return TokenBudget.parse(self.token_budget)

    @property
    def widenings(self) -> tuple[TokenBudget, ...]:
        """The budgets that `monitor` may raise the budget to, in order."""
        return tuple(self.budget.scaled(factor) for factor in WIDENINGS) if self.monitor == "widen" else ()

    @property
    def widest_budget(self) -> TokenBudget:
        """The largest budget that a step may have: memory is planned for it."""
        return (self.budget, *self.widenings)[-1]

    def resolve(self, *, head_dim: int, layers: int, trained_context: int, codes: bool = True) -> OffloadConfig:
        """The same config with everything open that a model decides filled in.

        Args:
            head_dim: Channels of one key.
            layers: Decoder layers of the model.
            trained_context: Positions the model was trained for.
            codes: Whether the calibration has, or will have, product codes.

        Raises:
            InputError: Labels that such heads cannot have, or a dense layer beyond the last.
        """
        given = (self.label_code, self.label_bits, self.label_channels)
        code, bits, channels = choose_labels(*given, head_dim, codes, self.calibration)
        beyond = [n for n in self.dense_layers if n >= layers]
        if beyond:
            raise InputError(
                f"dense_layers={beyond[0]} is beyond the last layer; this model has layers 0 to {layers - 1}"
            )
        return dataclasses.replace(
            self,
            max_context=trained_context if self.max_context is None else self.max_context,
            label_code=code,
            label_bits=bits,
            label_channels=channels,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self) | {"dense_layers": list(self.dense_layers)}
