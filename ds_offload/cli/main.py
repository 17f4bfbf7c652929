"""The entry point `ds-offload`: commands, exit statuses, and one line for everything that goes wrong."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Annotated

import typer

import ds_offload
from ds_offload.cli import bench, session
from ds_offload.cli import eval as evaluation
from ds_offload.cli.calibrate import calibrate
from ds_offload.cli.chat import chat
from ds_offload.cli.doctor import doctor
from ds_offload.cli.option_groups import add_options
from ds_offload.cli.plan import plan
from ds_offload.cli.run import run
from ds_offload.cli.serve import serve
from ds_offload.cli.summarize import summarize
from ds_offload.errors import InputError

DONE, FAILED, WRONG_INPUT, INTERRUPTED = 0, 1, 2, 130
LONGEST_REASON = 600
# What says that the path which the user gave is none to use.
_WRONG_PATH = {errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EROFS}

# typer brings its own copy of click in some versions and imports it in others; both derive from this.
_UsageError: type[Exception] = typer.BadParameter.__bases__[0]

_DEBUG_HELP = "Show the traceback when something goes wrong."

app = typer.Typer(
    add_completion=False,
    help="Decode over ultra-long contexts on one GPU, with the KV cache in host memory.",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    # Flags have an empty metavar in all commands: typer would show them as if they took a value.
    version: Annotated[bool, typer.Option("--version", metavar="", help="Show the version and exit.")] = False,
    debug: Annotated[bool, typer.Option("--debug", metavar="", help=_DEBUG_HELP)] = False,
) -> None:
    if version:
        print(f"ds-offload {ds_offload.__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit


def _register(command: Callable[..., None]) -> None:
    """Adds a command; --debug may stand after it too, and `main` reads the flag by itself."""
    debug = Annotated[bool | None, typer.Option("--debug", metavar="", help=_DEBUG_HELP)]
    app.command(name=command.__name__)(add_options(command, None, {"debug": debug}))


_register(run)
_register(chat)
_register(serve)
_register(summarize)
_register(calibrate)
_register(plan)
_register(doctor)
app.add_typer(bench.app, name="bench")
app.add_typer(evaluation.app, name="eval")
app.add_typer(session.app, name="session")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit status.

    0 is done, 1 failed at run time, 2 wrong input, 130 interrupted. Whatever goes wrong
    ends in one line on stderr; with --debug its traceback comes first.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            # The caller closed it. `print` would write to the other stream instead of none.
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - it stays open
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character gets a question mark, not an error.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        command = typer.main.get_command(app)
        with command.make_context("ds-offload", given) as context:
            command.invoke(context)
        sys.stdout.flush()
        return DONE
    except typer.Exit as request:
        return request.exit_code
    except BrokenPipeError:
        # The reader of our output has gone. What is still buffered must not raise again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (KeyboardInterrupt, typer.Abort):
        return _end(INTERRUPTED, "interrupted", debug)
    except _UsageError as error:
        return _end(WRONG_INPUT, f"error: {_describe_usage(error)}", debug)
    except InputError as error:
        return _end(WRONG_INPUT, f"error: {error}", debug)
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None and error.errno in _WRONG_PATH:
            path = os.fsdecode(error.filename)
            return _end(WRONG_INPUT, f"error: cannot use {path}: {error.strerror}; give another path", debug)
        reason = f"{type(error).__name__}: {error}" if str(error).strip() else type(error).__name__
        return _end(FAILED, f"failed: {reason}", debug, "; --debug shows where")


def _describe_usage(error: Exception) -> str:
    """What the parser of the command line says, and where to look."""
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "ds-offload"
    return f"{error.format_message().rstrip('.')}; see {path} --help"  # type: ignore[attr-defined]


def _end(status: int, message: str, debug: bool, hint: str = "") -> int:
    """One line on stderr, after the traceback where that was asked for."""
    if debug:
        traceback.print_exc()
        hint = ""
    line = " ".join(message.split())
    if len(line) > LONGEST_REASON:
        line = line[:LONGEST_REASON].rstrip() + " ..."
    print(f"ds-offload: {line}{hint}", file=sys.stderr, flush=True)
    return status
