"""Every way to install the package gives the same modules and data, under the same names, and nothing else becomes importable.

Works on a copy of the checkout that holds one backend and one table more, so that discovery is tested and nothing is built in place.
The environments are fresh; torch and the other dependencies are linked from the running one, and nothing is downloaded.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from email.parser import HeaderParser
from pathlib import Path

import pytest

from tests import fresh

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"titans_backends": "titans_backends", "backends": "titans_backends/backends", "autotune_cache": "titans_backends/autotune_cache"}
"""The folders of a checkout that are installed, and where to."""
ALONGSIDE = ("tests", "benchmarks", "docs", "examples", ".ci")
"""The other folders, which an sdist has beside them."""
DATA = (".yaml", ".cu", ".cuh", ".tmpl", ".j2", ".css", ".typed")
LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.egg-info", "results", "golden")
README_COMMANDS = (
    "pip install -c constraints.txt -e . && titans-backends tune",
    "pip install -c constraints.txt -e '.[test]' && pytest",
)

PROBE = """
import importlib, importlib.metadata, importlib.resources, importlib.util, json, pkgutil, sys
import torch
before = set(sys.modules)
import titans_backends
new = {name.partition(".")[0] for name in set(sys.modules) - before}

def fail(name):
    raise

walked, packages = [], [titans_backends, *map(importlib.import_module, ("titans_backends.backends", "titans_backends.autotune_cache"))]
for package in packages:
    walked += [package.__name__, *(module.name for module in pkgutil.walk_packages(package.__path__, package.__name__ + ".", fail))]
new_after_walk = {name.partition(".")[0] for name in set(sys.modules) - before}
before_reload = [type(finder).__name__ for finder in sys.meta_path]
for package in packages:
    importlib.reload(package)
print(json.dumps({
    "files": [package.__file__ for package in packages],
    "walked": walked,
    "new": sorted(new),
    "new_after_walk": sorted(new_after_walk),
    "table": importlib.resources.files("titans_backends.autotune_cache").joinpath("newcomer.yaml").is_file(),
    "kernel": importlib.resources.files("titans_backends.backends.newcomer").joinpath("cuda/tile.cu").is_file(),
    "strangers": [name for name in STRANGERS if importlib.util.find_spec(name)],
    "path": sys.path,
    "finders_after_reload": [type(finder).__name__ for finder in sys.meta_path] == before_reload,
}))
"""
KERNEL_PACKAGES = {"triton", "cupy", "cupyx", "numba", "numba_cuda", "cuda", "fla", "flash_qla", "flashinfer", "tilelang", "transformers"}
NEVER_OURS = tuple(f"titans_backends.{name}" for name in ("tests", "benchmarks", "setup", "conftest", "docs"))
NEVER_TOP_LEVEL = ("backends", "autotune_cache", "tests", "benchmarks", "setup", "conftest")


@dataclass(frozen=True, slots=True)
class Way:
    """A way to have the package: the interpreter, what is set for it, where it starts, and where the package should come from."""

    python: Path
    start: Path
    origin: Path
    tree: Path
    pythonpath: Path | None = None
    installed: bool = True


def run(*command: str | Path, cwd: Path, extra: Mapping[str, str] | None = None, streams: bool = False) -> str:
    """The command's output, with `streams` what it said on the other stream too; a failure shows both."""
    kept = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}}
    env = {**kept, "PYTHONDONTWRITEBYTECODE": "1", **(extra or {})}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command} gave {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr if streams else done.stdout


def module_names(tree: Path) -> set[str]:
    """The dotted names of a checkout's modules, from its files."""
    names = set()
    for folder, place in FOLDERS.items():
        for file in (tree / folder).rglob("*.py"):
            inside = (Path(place) / file.relative_to(tree / folder)).with_suffix("")
            names.add(".".join(inside.parent.parts if inside.name == "__init__" else inside.parts))
    return names


def installed_files(tree: Path) -> set[str]:
    """The files that an installation of a checkout has, as a wheel writes them."""
    return {
        (Path(place) / file.relative_to(tree / folder)).as_posix()
        for folder, place in FOLDERS.items()
        for file in (tree / folder).rglob("*")
        if file.suffix == ".py" or file.suffix in DATA
    }


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout with one backend and one table more."""
    copy = tmp_path_factory.mktemp("checkout")
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy2(file, copy)
    for folder in (*FOLDERS, *ALONGSIDE):
        if (ROOT / folder).is_dir():
            shutil.copytree(ROOT / folder, copy / folder, ignore=LEFT_OUT)
    newcomer = copy / "backends" / "newcomer"
    (newcomer / "cuda").mkdir(parents=True)
    (newcomer / "__init__.py").write_text('"""A backend that no list names."""\n')
    (newcomer / "slow_core.py").write_text('"""Its op."""\n')
    (newcomer / "cuda" / "tile.cu").write_text("// a kernel\n")
    (newcomer / "cuda" / "tile.cuh").write_text("// its header\n")
    (copy / "autotune_cache" / "newcomer.yaml").write_text("schema: 1\n")
    return copy


@pytest.fixture(scope="module")
def wheels(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A wheel built from the checkout, and one built from the checkout's sdist."""
    out = tmp_path_factory.mktemp("dist")
    for way, what in (("sdist", ()), ("direct", ("--wheel",))):
        said = run(sys.executable, "-m", "build", "--no-isolation", tree, "--outdir", out / way, *what, cwd=out, streams=True)
        assert "Package would be ignored" not in said, "setuptools warns that a folder of data is no package"
        shutil.rmtree(tree / "build", ignore_errors=True)
    return {way: next((out / way).glob("*.whl")) for way in ("direct", "sdist")}


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder outside the checkout."""
    return tmp_path_factory.mktemp("elsewhere")


def environment(path: Path) -> Path:
    """A fresh virtual environment's interpreter; the running one's packages are linked beside it, all but ours, however ours is installed there."""
    venv.create(path, with_pip=False, symlinks=True)
    borrowed = path / "borrowed"
    borrowed.mkdir()
    for folder in (Path(entry) for entry in sys.path if entry.endswith(("site-packages", "dist-packages"))):
        for entry in folder.iterdir():
            ours = entry.name.startswith(("titans_backends", "__editable__", "__pycache__")) or entry.suffix == ".pth"
            if not ours and not (borrowed / entry.name).exists():
                (borrowed / entry.name).symlink_to(entry)
    (site_packages(path) / "borrowed.pth").write_text(f"{borrowed}\n")
    return path / "bin" / "python"


def site_packages(path: Path) -> Path:
    return path / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"


def pip_install(python: Path, *what: str | Path, cwd: Path) -> None:
    """Installs into another environment, from what is at hand alone."""
    options = ("--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed")
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, *what, cwd=cwd)


@pytest.fixture(scope="module")
def from_wheel(tmp_path_factory: pytest.TempPathFactory, wheels: dict[str, Path], tree: Path, elsewhere: Path) -> Way:
    path = tmp_path_factory.mktemp("wheel") / "venv"
    python = environment(path)
    pip_install(python, wheels["direct"], cwd=elsewhere)
    return Way(python, elsewhere, site_packages(path) / "titans_backends", tree)


@pytest.fixture(scope="module")
def from_editable(tmp_path_factory: pytest.TempPathFactory, tree: Path, elsewhere: Path) -> Way:
    python = environment(tmp_path_factory.mktemp("editable") / "venv")
    pip_install(python, "-e", tree, cwd=elsewhere)
    return Way(python, elsewhere, tree, tree)


@pytest.fixture(scope="module")
def from_strict_editable(tmp_path_factory: pytest.TempPathFactory, tree: Path, elsewhere: Path) -> Way:
    python = environment(tmp_path_factory.mktemp("strict") / "venv")
    pip_install(python, "--config-settings", "editable_mode=strict", "-e", tree, cwd=elsewhere)
    return Way(python, elsewhere, tree / "build", tree)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment that has the dependencies and not the package."""
    return environment(tmp_path_factory.mktemp("bare") / "venv")


@pytest.fixture(scope="module")
def from_pythonpath(bare: Path, tree: Path, elsewhere: Path) -> Way:
    return Way(bare, elsewhere, tree, tree, pythonpath=tree, installed=False)


@pytest.fixture(scope="module")
def from_working_directory(bare: Path, tree: Path) -> Way:
    return Way(bare, tree, tree, tree, installed=False)


@pytest.fixture(scope="module")
def from_other_checkout(from_editable: Way, tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Way:
    """A second checkout on PYTHONPATH, in an environment where the first is installed as editable."""
    second = tmp_path_factory.mktemp("second") / "checkout"
    shutil.copytree(tree, second, ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
    return Way(from_editable.python, from_editable.start, second, second, pythonpath=second, installed=False)


WAYS = ("from_wheel", "from_editable", "from_strict_editable", "from_pythonpath", "from_working_directory", "from_other_checkout")


@pytest.mark.parametrize("name", WAYS)
def test_a_walk_meets_the_packages_own_modules_and_no_others(name: str, request: pytest.FixtureRequest) -> None:
    way: Way = request.getfixturevalue(name)
    strangers = NEVER_OURS + (NEVER_TOP_LEVEL if way.installed else ())
    extra = {} if way.pythonpath is None else {"PYTHONPATH": str(way.pythonpath)}
    found = json.loads(run(way.python, "-c", f"STRANGERS = {strangers!r}\n{PROBE}", cwd=way.start, extra=extra).splitlines()[-1])

    assert set(found["walked"]) == module_names(way.tree)
    assert "titans_backends.backends.newcomer.slow_core" in found["walked"]
    assert all(Path(file).is_relative_to(way.origin) for file in found["files"]), (found["files"], way.origin)
    assert found["table"], "importlib.resources does not find the shipped table"
    assert found["kernel"], "importlib.resources does not find the kernel's source"
    assert found["strangers"] == []
    assert found["finders_after_reload"], "importlib.reload changed sys.meta_path"
    assert not [entry for entry in found["path"] if Path(entry).name in {"backends", "autotune_cache"}]
    assert not KERNEL_PACKAGES & set(found["new"]), "import titans_backends imports a kernel package"
    assert not KERNEL_PACKAGES & set(found["new_after_walk"]), "a manifest imports a kernel package"


@pytest.mark.parametrize("way", ["direct", "sdist"])
def test_a_wheel_holds_every_module_and_data_file_and_nothing_else(way: str, wheels: dict[str, Path], tree: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheels[way]).namelist() if ".dist-info/" not in name}
    assert names == installed_files(tree)
    assert {
        "titans_backends/py.typed",
        "titans_backends/autotune_cache/newcomer.yaml",
        "titans_backends/backends/newcomer/cuda/tile.cu",
        "titans_backends/backends/newcomer/cuda/tile.cuh",
    } <= names


def test_an_sdist_holds_every_file_of_the_checkout(wheels: dict[str, Path], tree: Path) -> None:
    """So that its tests, its pages and what CI runs work from it."""
    with tarfile.open(next(wheels["sdist"].parent.glob("*.tar.gz"))) as archive:
        names = {entry.name.partition("/")[2] for entry in archive if entry.isfile()}
    made = re.compile(r"(build|dist|site|\.[a-z]+_cache)/|.*\.egg-info/|\.git$")
    files = {file.relative_to(tree).as_posix() for file in tree.rglob("*") if file.is_file()}
    assert {name for name in files if not made.match(name)} - names == set()


def test_site_packages_gets_one_name(from_wheel: Way) -> None:
    listing = {entry.name for entry in from_wheel.origin.parent.iterdir()} - {"borrowed.pth", "__pycache__"}
    assert {name for name in listing if not name.endswith(".dist-info")} == {"titans_backends"}


def test_metadata_states_licence_version_extras_and_script(wheels: dict[str, Path]) -> None:
    archive = zipfile.ZipFile(wheels["direct"])
    info = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA")).removesuffix("METADATA")
    metadata = HeaderParser().parsestr(archive.read(f"{info}METADATA").decode())
    version = re.search(r'__version__ = "(.+)"', (ROOT / "titans_backends" / "_version.py").read_text())
    assert version is not None
    assert metadata["Version"] == version[1]
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert set(metadata.get_all("Provides-Extra", [])) == {"triton", "cuda12", "cuda13", "numba", "report", "test", "docs", "all"}
    assert "Apache License" in archive.read(f"{info}licenses/LICENSE").decode()
    assert "titans-backends = titans_backends.cli:main" in archive.read(f"{info}entry_points.txt").decode()
    assert metadata["Description-Content-Type"] == "text/markdown"
    shown = metadata.get_payload()
    assert "titans-backends tune" in shown
    assert "](docs/" not in shown  # where an index shows it, a relative link leads nowhere


def test_the_script_and_the_module_list_the_same_commands(from_wheel: Way) -> None:
    script = run(from_wheel.python.parent / "titans-backends", "--help", cwd=from_wheel.start)
    module = fresh.run("import runpy, sys; sys.argv = ['', '--help']; runpy.run_module('titans_backends', run_name='__main__')")
    assert "tune" in script
    assert commands(script) == commands(module.stdout)


def commands(shown: str) -> list[str]:
    """The help's tables, without the line that names the program."""
    return [line for line in shown.splitlines() if line.startswith("│")]


def test_the_readme_holds_the_two_commands_and_ci_runs_the_second() -> None:
    readme = (ROOT / "README.md").read_text()
    assert [command for command in README_COMMANDS if command not in readme] == []
    ci = ROOT / ".ci" / "run"
    assert README_COMMANDS[1] in ci.read_text()
    assert os.access(ci, os.X_OK)


def test_every_requirement_has_an_exact_constraint() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = [*project["dependencies"], *(item for extra in project["optional-dependencies"].values() for item in extra)]
    asked = {re.split(r"[\[<>=!~; ]", item)[0].lower() for item in requirements} - {project["name"]}
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []
    pinned = dict(line.lower().split("==") for line in lines)
    assert len(pinned) == len(lines), "a package is constrained twice"
    assert asked - set(pinned) == set()
    assert (pinned["torch"], pinned["triton"]) == ("2.13.0", "3.7.1"), "the ordinary Linux torch pins its triton"


def test_dependencies_are_open_ranges() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    items = [*project["dependencies"], *(item for name, extra in project["optional-dependencies"].items() if name != "all" for item in extra)]
    assert [item for item in items if not re.fullmatch(r"[\w-]+(\[[\w,]+\])?>=[\d.]+(,!=[\d.]+\*)?(; [^;]+)?", item)] == []
    assert project["optional-dependencies"]["all"] == ["titans-backends[triton,cuda13,numba,report,test,docs]"]
