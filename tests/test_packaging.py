"""The three top-level folders as subpackages: in the wheel, in an editable install and in an uninstalled checkout."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import ds_offload

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("kernels", "memory", "prefetch")
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
OFFLINE = ["--no-deps", "--no-build-isolation", "--no-index"]

# Where every module named on the command line is found, one line each.
FIND = "import importlib.util, sys\nfor name in sys.argv[1:]: print(importlib.util.find_spec(name).origin)"


def sources(root: Path) -> dict[str, Path]:
    """The project's Python files under the names that they install as."""
    found = {f"ds_offload/{path.relative_to(root / 'ds_offload')}": path for path in root.glob("ds_offload/**/*.py")}
    for folder in FOLDERS:
        found |= {f"ds_offload/{path.relative_to(root)}": path for path in root.glob(f"{folder}/**/*.py")}
    return found


def modules(root: Path) -> list[str]:
    names = [name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in sources(root)]
    return sorted(names)


def run(command: list[str | os.PathLike], cwd: Path, path: str = "") -> str:
    """Standard output of a command that must succeed, with `path` as PYTHONPATH."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PIP_TARGET"))}
    env |= {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree, since building writes into it."""
    copy = tmp_path_factory.mktemp("packaging") / "tree"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "tests"))
    return copy


@pytest.fixture(scope="module")
def wheel(tree: Path) -> Path:
    run([*PIP, "wheel", *OFFLINE, "--wheel-dir", tree.parent / "wheels", tree], tree.parent)
    (built,) = (tree.parent / "wheels").iterdir()
    return built


@pytest.fixture(scope="module")
def editable(tree: Path) -> Path:
    """A virtual environment with an editable install of `tree`, over the packages of this one."""
    folder = tree.parent / "venv"
    venv.create(folder, system_site_packages=True, symlinks=True)
    python = folder / "bin" / "python"
    site = run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], tree.parent).strip()
    Path(site, "outer.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    run([*PIP, "--python", python, "install", *OFFLINE, "--editable", tree], tree.parent)
    return python


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    info = f"ds_offload-{ds_offload.__version__}.dist-info/"
    data = {str(path.relative_to(ROOT)) for path in (ROOT / "ds_offload" / "data").rglob("*") if path.is_file()}
    assert {"ds_offload/data/calibration.txt", "ds_offload/data/smollm2-135m-64k/adapter_model.safetensors"} <= data
    assert "ds_offload/kernels/gather.py" in names
    expected = set(sources(ROOT)) | data | {"ds_offload/py.typed"}
    assert {name for name in names if not name.startswith(info)} == expected
    assert {f"{info}licenses/LICENSE", f"{info}licenses/NOTICE"} <= names


def test_the_wheel_has_the_command(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        points = configparser.ConfigParser()
        points.read_string(archive.read(f"ds_offload-{ds_offload.__version__}.dist-info/entry_points.txt").decode())
    assert dict(points["console_scripts"]) == {"ds-offload": "ds_offload.__main__:main"}


def test_a_wheel_from_the_source_distribution_is_the_same(tree: Path, wheel: Path) -> None:
    run([sys.executable, "setup.py", "-q", "sdist", "--dist-dir", tree.parent / "sdist"], tree)
    (source,) = (tree.parent / "sdist").iterdir()
    (tree.parent / "unpacked").mkdir()
    # Python's own takes `filter` from 3.11.4 on, and warns without it later.
    run(["tar", "-xf", source, "-C", tree.parent / "unpacked"], tree.parent)
    (unpacked,) = (tree.parent / "unpacked").iterdir()
    run([*PIP, "wheel", *OFFLINE, "--wheel-dir", tree.parent / "again", unpacked], tree.parent)
    (again,) = (tree.parent / "again").iterdir()
    assert sorted(zipfile.ZipFile(again).namelist()) == sorted(zipfile.ZipFile(wheel).namelist())


def test_every_module_is_found_in_an_installed_wheel(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    run([*PIP, "install", *OFFLINE, "--target", site, wheel], tmp_path)
    found = run([sys.executable, "-c", FIND, *modules(ROOT)], tmp_path, str(site)).splitlines()
    assert sorted(found) == sorted(str(site / name) for name in sources(ROOT))


def test_every_module_is_found_in_an_editable_install(editable: Path, tree: Path, tmp_path: Path) -> None:
    found = run([editable, "-c", FIND, *modules(tree)], tmp_path).splitlines()
    assert sorted(found) == sorted(map(str, sources(tree).values()))
    assert "run" in run([editable.parent / "ds-offload", "--help"], tmp_path)


@pytest.mark.parametrize("where", ["elsewhere", "root"])
def test_every_module_is_found_in_an_uninstalled_checkout(where: str, tree: Path, tmp_path: Path) -> None:
    cwd, path = (tmp_path, str(tree)) if where == "elsewhere" else (tree, "")
    found = run([sys.executable, "-c", FIND, *modules(tree)], cwd, path).splitlines()
    assert sorted(found) == sorted(map(str, sources(tree).values()))


def test_modules_of_every_folder_import_from_an_installed_wheel(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    run([*PIP, "install", *OFFLINE, "--target", site, wheel], tmp_path)
    code = "import ds_offload.generator as g, ds_offload.kernels.gather as k; print(g.__file__, k.__file__)"
    assert run([sys.executable, "-c", code], tmp_path, str(site)).split() == [
        str(site / "ds_offload" / "generator.py"),
        str(site / "ds_offload" / "kernels" / "gather.py"),
    ]


def test_the_folders_do_not_shadow_other_packages(tree: Path, tmp_path: Path) -> None:
    """`kernels` is also a package that transformers imports where it is installed."""
    for folder in (*FOLDERS, "tests"):
        assert not (ROOT / folder / "__init__.py").exists()
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("whose = 'another'\n", encoding="utf-8")
    assert run([sys.executable, "-c", "import kernels; print(kernels.whose)"], tree, str(tmp_path)).split() == [
        "another"
    ]
    code = "from transformers import LlamaForCausalLM; from transformers.utils import is_kernels_available as there; "
    code += "print(there())"
    assert run([sys.executable, "-c", code], tree) == run([sys.executable, "-c", code], tmp_path)
