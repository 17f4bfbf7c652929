"""`ds-offload session`: the documents that are kept read, listed, shown, verified and removed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ds_offload.cli.figures import bytes_text
from ds_offload.cli.option_groups import SessionsDirOption, add_options
from ds_offload.errors import InputError
from ds_offload.session_names import session_path, sessions_folder

if TYPE_CHECKING:
    from ds_offload.session_header import SessionHeader

app = typer.Typer(help="Documents kept read by `ds-offload run --session`: list, show, verify, rm.")

NameArgument = Annotated[str, typer.Argument(metavar="NAME|PATH", help="A session's name, or its folder.")]
JsonOption = Annotated[bool, typer.Option("--json", metavar="", help="Print one JSON object and nothing else.")]


@app.callback(invoke_without_command=True)
def _root(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit


def list_sessions(
    where: Annotated[
        str | None, typer.Argument(metavar="[NAME|PATH]", help="One session, or a folder of sessions.")
    ] = None,
    sessions_dir: SessionsDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """One line for every session: its name, tokens, bytes, model and age; what is wrong with a damaged one."""
    from ds_offload.session_place import HEADER

    folder = session_path(where, sessions_dir) if where is not None else sessions_folder(sessions_dir)
    if where is not None and not folder.is_dir():
        raise InputError(f"there is no folder {folder}; give a session's name, or a folder of sessions")
    if sessions_dir is not None and not sessions_folder(sessions_dir).is_dir():
        raise InputError(f"--sessions-dir {sessions_dir!r} is no folder; give the folder of sessions")
    if (folder / HEADER).is_file():
        found = [folder]
    else:
        found = sorted(header.parent for header in folder.glob(f"[!.]*/{HEADER}")) if folder.is_dir() else []
    rows = [_row(path) for path in found]
    if as_json:
        print(json.dumps({"sessions": rows}))
        return
    if not rows:
        print(f"no sessions in {folder}")
    for row in rows:
        if "damage" in row:
            print(f"{row['name']}  {row['damage']}")
        else:
            size = bytes_text(row["bytes"])
            print(f"{row['name']}  {row['tokens']:,} tokens  {size}  {row['model']}  {row['created']}")


def show(name: NameArgument, sessions_dir: SessionsDirOption = None, as_json: JsonOption = False) -> None:
    """What a session is of, and by which settings; its files are not read."""
    from ds_offload.session_header import SessionHeader
    from ds_offload.session_place import recover

    folder = session_path(name, sessions_dir)
    recover(folder)
    facts = _facts(folder, SessionHeader.read(folder))
    if as_json:
        print(json.dumps(facts))
        return
    width = max(map(len, facts))
    for label, value in facts.items():
        print(f"{label.replace('_', ' '):<{width}}  {f'{value:,}' if isinstance(value, int) else value}")


def verify(name: NameArgument, sessions_dir: SessionsDirOption = None) -> None:
    """Read a session's files and hold them to their checksums."""
    from ds_offload.session_file import verify_session

    folder = session_path(name, sessions_dir)
    header = verify_session(folder)
    print(f"{folder} is sound: {len(header.files) + 1} files, {bytes_text(header.nbytes)}")


def rm(name: NameArgument, sessions_dir: SessionsDirOption = None) -> None:
    """Delete a session, damaged or not."""
    from ds_offload.session_place import remove_session

    folder = session_path(name, sessions_dir)
    remove_session(folder)
    print(f"removed {folder}")


def _row(folder: Path) -> dict[str, Any]:
    from ds_offload.session_header import SessionHeader

    try:
        header = SessionHeader.read(folder)
    except InputError as error:
        return {"name": folder.name, "path": str(folder), "damage": str(error)}
    return {"name": folder.name} | _facts(folder, header)


def _facts(folder: Path, header: SessionHeader) -> dict[str, Any]:
    identity = dataclasses.asdict(header.identity)
    return {
        "path": str(folder),
        "model": header.model_name,
        "created": header.created,
        "tokens": len(header.token_ids),
        "document_tokens": header.document_tokens,
        "bytes": header.nbytes,
        **{f"{field}_fingerprint": identity.pop(field) or "none" for field in ("model", "tokenizer", "chat_template")},
        **identity,
    }


_COMMANDS: dict[str, Callable[..., None]] = {"list": list_sessions, "show": show, "verify": verify, "rm": rm}
for _name, _command in _COMMANDS.items():
    _debug = Annotated[
        bool | None, typer.Option("--debug", metavar="", help="Show the traceback when something goes wrong.")
    ]
    app.command(name=_name)(add_options(_command, None, {"debug": _debug}))
