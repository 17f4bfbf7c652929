"""Memory limits of the control groups that this process is in, of both versions."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Files of a group's folder by the file system's type: limit, usage, and what `memory.stat` calls the cache.
_FILES = {
    "cgroup": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    "cgroup2": ("memory.max", "memory.current", "inactive_file"),
}
# Version 1 writes "no limit" as a number near 2^63.
_NO_LIMIT = 1 << 60


@dataclass(frozen=True)
class CgroupLimit:
    """A control group that limits memory.

    Attributes:
        path: The group, such as "/docker/1f3a"; "/" is the one that a container sees as its root.
        limit_bytes: Most that the group may use.
        used_bytes: What it uses now, without file cache that the kernel drops when memory is short.
    """

    path: str
    limit_bytes: int
    used_bytes: int

    @property
    def free_bytes(self) -> int:
        """What is left under the limit, at least 0."""
        return max(0, self.limit_bytes - self.used_bytes)


def cgroup_limits(root: Path = Path("/")) -> list[CgroupLimit]:
    """The groups with a limit, from the process's own up to the topmost that is visible; versions 1 and 2.

    Args:
        root: What stands for "/", with `proc/self` and the cgroup file systems below it.
    """
    return [
        limit
        for kind, mount, group in _memory_groups(root)
        for limit in _limits_upwards(kind, root / mount.lstrip("/"), group)
    ]


def _memory_groups(root: Path) -> Iterator[tuple[str, str, str]]:
    """File system type, mount point and group below it of every hierarchy that counts memory."""
    groups = {}
    for line in _lines(root / "proc/self/cgroup"):
        number, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if number == "0" and not controllers:
            groups["cgroup2"] = group
        elif "memory" in controllers.split(","):
            groups["cgroup"] = group
    for line in _lines(root / "proc/self/mountinfo"):
        left, _, right = line.partition(" - ")
        fields, kind, options = left.split(), right.split(" ")[0], right.split(" ")[-1].split(",")
        if len(fields) < 5 or kind not in groups or (kind == "cgroup" and "memory" not in options):
            continue
        top, mount = _unescape(fields[3]), _unescape(fields[4])
        group = groups[kind]
        # A container sees its own group mounted as the root, and may still be told the path on the host.
        inside = "/" if top in ("/", "") else top.rstrip("/") + "/"
        if (group.rstrip("/") + "/").startswith(inside) and ".." not in group.split("/"):
            yield kind, mount, "/" + (group.rstrip("/") + "/")[len(inside) :].rstrip("/")
        else:
            yield kind, mount, "/"


def _limits_upwards(kind: str, mount: Path, group: str) -> Iterator[CgroupLimit]:
    limit_file, usage_file, cache_name = _FILES[kind]
    parts = [part for part in group.split("/") if part]
    for depth in range(len(parts), -1, -1):
        folder = mount.joinpath(*parts[:depth])
        limit = _number(folder / limit_file)
        if limit is None or limit >= _NO_LIMIT:
            continue
        used = (_number(folder / usage_file) or 0) - _cache(folder / "memory.stat", cache_name)
        yield CgroupLimit("/" + "/".join(parts[:depth]), limit, max(0, used))


def _cache(path: Path, name: str) -> int:
    for line in _lines(path):
        key, _, value = line.partition(" ")
        if key == name and value.strip().isdigit():
            return int(value)
    return 0


def _number(path: Path) -> int | None:
    """The number in a file; None for "max", another text, or no such file."""
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdigit() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return []


def _unescape(path: str) -> str:
    """mountinfo writes a space as "\\040"."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), path)
