"""The command `ds-offload`, also as `python -m ds_offload`: the command line, once Ctrl-C is taken care of."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

# While one of these is imported nothing is at work that would have to be ended.
_LOADED_FIRST = ("numpy", "torch", "transformers")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit status (`ds_offload/cli/main.py`).

    Ctrl-C raises KeyboardInterrupt once torch is there. Before, the process ends at once: imports
    of compiled modules may swallow the exception, and a command line has not begun to work.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    from ds_offload.cli import main as command_line

    return command_line.main(arguments)


def _interrupt(number: int, frame: FrameType | None) -> None:
    specs = [getattr(sys.modules.get(name), "__spec__", None) for name in _LOADED_FIRST]
    if "torch" not in sys.modules or any(getattr(spec, "_initializing", False) for spec in specs):
        os.write(2, b"ds-offload: interrupted\n")
        os._exit(130)
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
