"""Calls of transformers that load: quiet, and of one thread at a time."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging as transformers_logging

# transformers replaces parts of itself and of torch while it loads; a thread that loads meanwhile misses weights.
_LOADING = threading.RLock()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Only errors from transformers, and its progress bars (on stderr) only on a terminal; one thread at a time."""
    with _LOADING:
        verbosity = transformers_logging.get_verbosity()
        bars = transformers_logging.is_progress_bar_enabled()
        transformers_logging.set_verbosity_error()
        if not sys.stderr.isatty():
            transformers_logging.disable_progress_bar()
        try:
            yield
        finally:
            transformers_logging.set_verbosity(verbosity)
            if bars:
                transformers_logging.enable_progress_bar()
