"""The address that is listened on, taken before anything else is done."""

from __future__ import annotations

import errno
import socket

from ds_offload.errors import InputError


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to `host` and `port`, 0 being any that is free.

    Raises:
        InputError: There is no such address here, or it is taken.
    """
    if not 0 <= port <= 65535:
        raise InputError(f"--port {port} is none; give one from 0 (any that is free) to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "not a name of a host"
        raise InputError(f"--host {host!r} cannot be found: {reason}; give an address of this machine") from None
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise InputError(f"cannot listen on {host} port {port}: {error.strerror}; {_remedy(error.errno)}") from None
    return bound


def url_of(bound: socket.socket) -> str:
    """The address of a bound socket, as clients write it."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _remedy(number: int | None) -> str:
    if number == errno.EADDRNOTAVAIL:
        return "give --host an address of this machine, such as 127.0.0.1"
    return "give another --port, or 0 for any that is free"
