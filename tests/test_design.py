"""The map of the modules in docs/design.md: every module, by the first line of its docstring."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("ds_offload", "kernels", "memory", "prefetch", "scripts")


def summary(path: Path) -> str:
    """The first line of a module's docstring."""
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]


def test_the_map_has_a_line_for_every_module() -> None:
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8").partition("## Map of the modules")[2]
    listed: dict[str, str] = {}
    folder = ""
    for line in text.splitlines():
        if heading := re.match(r"`([\w/]+/)`", line):
            folder = heading[1]
        elif entry := re.fullmatch(r"- `(\w+\.py)`: (.+)", line):
            listed[folder + entry[1]] = entry[2]
    # Packages have a list each, and no line; all but the first.
    modules = [path for name in FOLDERS for path in (ROOT / name).rglob("*.py") if path.name != "__init__.py"]
    modules.append(ROOT / "ds_offload" / "__init__.py")
    assert len(modules) > 200
    assert listed == {str(path.relative_to(ROOT)): summary(path) for path in modules}
