"""One thing that `ds-offload doctor` looked at, and what it found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

OK, WARN, FAIL = "ok", "warn", "fail"


@dataclass(frozen=True)
class Check:
    """A finding.

    Attributes:
        status: "ok", "warn" (it works, with less than could be had) or "fail".
        value: What was found, in a line.
        cure: What to do about it, one sentence; empty where the status is "ok".
        figures: The numbers of `value` by name, for programs.
    """

    name: str
    status: str
    value: str
    cure: str = ""
    figures: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def attempt(name: str, work: Callable[[], str], cure: str, otherwise: str = FAIL) -> Check:
    """A check that is `work` going well: what it returns is the value.

    Args:
        work: Raises any exception if what it tries does not work.
        cure: What to do then.
        otherwise: The status then.
    """
    try:
        return Check(name, OK, work())
    except Exception as error:
        return Check(name, otherwise, reason_of(error), cure)


def reason_of(error: Exception) -> str:
    """An exception in one line."""
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text[:300]}"


def worst(checks: list[Check]) -> str:
    """The worst status among `checks`."""
    found = {check.status for check in checks}
    return next((status for status in (FAIL, WARN) if status in found), OK)
