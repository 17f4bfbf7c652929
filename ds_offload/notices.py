"""One line on stderr for what a user must know: a choice made, a limit met, a download.

Notices go through the logger "ds_offload", so a program that embeds the runtime
can redirect or silence them with `logging`.
"""

from __future__ import annotations

import logging
import sys


class _StderrHandler(logging.Handler):
    """Writes to the `sys.stderr` of the moment, so a redirected stderr is honoured."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"ds-offload: {record.getMessage()}", file=sys.stderr, flush=True)


_logger = logging.getLogger("ds_offload")
_logger.addHandler(_StderrHandler())
_logger.setLevel(logging.INFO)
_logger.propagate = False


def notice(message: str) -> None:
    """Say `message` on stderr."""
    _logger.info("%s", message)


def warn(message: str) -> None:
    """Say `message` on stderr as a warning."""
    _logger.warning("%s", message)
