"""Errors that are the user's to act on."""

from __future__ import annotations


class InputError(ValueError):
    """A wrong input: one line that says what was given, what is needed and what to do.

    The command line prints it without a traceback and exits with status 2.
    """


class MemoryPlanError(InputError):
    """A request that does not fit the memory there is; raised before weights load."""


class LoadError(InputError):
    """Weights, a tokenizer or a calibration that cannot be had or cannot be trusted."""
