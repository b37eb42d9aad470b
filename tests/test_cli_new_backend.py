"""`new-backend`: what it writes is right at once, on every kind that can run here, lint-clean and installable; what it refuses it says, writing nothing."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import titans_backends as tb
from titans_backends import registry
from titans_backends.cli import app, exit_codes
from titans_backends.conformance import examine, items
from titans_backends.contracts import CONTRACTS
from titans_backends.scaffold import KINDS

ROOT = Path(__file__).parent.parent
RUFF = """line-length = 150
[lint]
select = ["B", "C4", "E", "F", "I", "PGH", "PIE", "PT", "RET", "RUF", "SIM", "UP", "W"]
isort.known-first-party = ["titans_backends"]
"""


def new(*words: str | Path) -> Result:
    return CliRunner().invoke(app, ["new-backend", *map(str, words)])


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """`written(name, *options)` writes a plugin and puts it on the path, as an installation would."""
    made: list[str] = []

    def write(name: str, *options: str) -> Path:
        folder = tmp_path / name
        result = new(name, "--output", folder, *options)
        assert result.exit_code == exit_codes.FINE, result.output
        made.append(name)
        monkeypatch.syspath_prepend(str(folder))
        monkeypatch.setenv("TITANS_BACKENDS_PLUGINS", ",".join(made))
        tb.reset()
        return folder

    yield write
    for name in [name for name in sys.modules if name.partition(".")[0] in made]:
        del sys.modules[name]
    monkeypatch.undo()
    tb.reset()


def statuses(backend: str, **limits: object) -> dict[str, int]:
    """How many items passed, were refused or failed; a failure's detail fails the test."""
    results = [examine(item) for item in items(backend, **limits)]  # type: ignore[arg-type]
    assert [result.detail for result in results if result.status == "failed"] == []
    return {status: sum(result.status == status for result in results) for status in ("passed", "refused")}


def test_the_torch_kind_passes_every_case_in_both_regimes(written: Callable[..., Path]) -> None:
    written("mine")
    assert registry.known()["mine"].origin == "TITANS_BACKENDS_PLUGINS"
    found = statuses("mine", dtypes=(torch.float32, torch.bfloat16))
    assert found["passed"] > 30
    assert found["refused"] == 0


@pytest.mark.parametrize("op", sorted(CONTRACTS))
def test_any_op_begins_with_its_reference_and_is_right(op: str, written: Callable[..., Path]) -> None:
    written("mine", "--op", op)
    cases = items("mine", dtypes=(torch.float32,), regimes=("inference",))
    chosen = [examine(item) for item in [*cases[:: max(1, len(cases) // 4)], *(one for one in cases if one.case.options.get("inplace"))]]
    assert [result.detail for result in chosen if result.status != "passed"] == []
    assert len(chosen) >= 3


@pytest.mark.skipif(find_spec("numba") is None, reason="the package numba is not installed: pip install -c constraints.txt -e '.[test]'")
def test_the_numba_kind_passes_in_float32_and_refuses_the_rest(written: Callable[..., Path]) -> None:
    written("quick", "--kind", "numba")
    assert statuses("quick", dtypes=(torch.float32,), regimes=("inference",))["refused"] == 0
    assert statuses("quick", dtypes=(torch.float64,), regimes=("inference",))["passed"] == 0


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="the package triton is not installed: pip install -c constraints.txt -e '.[test]'")
def test_the_triton_kind_passes_in_the_interpreter_and_is_not_offered_a_cpu_without_it(written: Callable[..., Path]) -> None:
    """Triton decides at import whether it interprets, so the cases run in a process of their own."""
    folder = written("tiled", "--kind", "triton")
    assert dict(registry.known()["tiled"].rank) == {"cuda": 9}
    script = (
        "import torch; from titans_backends.conformance import examine, items\n"
        "found = [examine(i) for i in items('tiled', dtypes=(torch.float32,), regimes=('inference',)) if i.case.name.startswith(('plain', 'odd'))][:2]\n"
        "print([(r.status, r.detail) for r in found])"
    )
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "TITANS_BACKENDS_PLUGINS": "tiled"}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == str([("passed", "")] * 2), done.stdout + done.stderr


def test_the_cupy_kinds_source_compiles_for_a_gpu(written: Callable[..., Path]) -> None:
    if find_spec("cuda") is None or find_spec("cuda.core") is None:
        pytest.skip("the package cuda-core is not installed: pip install -c constraints.txt -e '.[test]'")
    from cuda.core import Program, ProgramOptions

    source = (written("blocks", "--kind", "cupy") / "blocks" / "fused_uw.py").read_text().split('r"""')[1].split('"""')[0]
    try:
        compiled = Program(source, "c++", ProgramOptions(arch="sm_90")).compile("cubin")
    except RuntimeError as error:
        pytest.skip(f"NVRTC cannot be loaded: {str(error).splitlines()[0]}")
    assert len(compiled.code) > 1000
    reason = registry.availability(registry.known()["blocks"], tb.detect("cpu"))
    assert "it does not run on cpu" in str(reason)


def test_what_is_written_is_formatted_and_lint_clean(tmp_path: Path) -> None:
    if find_spec("ruff") is None:
        pytest.skip("the package ruff is not installed: pip install -c constraints.txt -e '.[test]'")
    (tmp_path / "ruff.toml").write_text(RUFF)
    for kind in KINDS:
        assert new(f"my_{kind}", "--kind", kind, "--output", tmp_path / f"for_{kind}").exit_code == exit_codes.FINE
    assert new("any_op", "--op", "gated_delta_rule", "--output", tmp_path / "any").exit_code == exit_codes.FINE
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run([sys.executable, "-m", "ruff", *command, tmp_path], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


def test_the_project_declares_its_entry_point_and_packages_its_tables(tmp_path: Path) -> None:
    assert new("my_kernels", "--kind", "numba", "--output", tmp_path / "p").exit_code == exit_codes.FINE
    project = tomllib.loads((tmp_path / "p" / "pyproject.toml").read_text())
    assert project["project"]["name"] == "titans-backends-my-kernels"
    assert project["project"]["entry-points"][registry.GROUP] == {"my_kernels": "my_kernels"}
    assert project["project"]["dependencies"] == ["titans-backends", "numba>=0.61"]
    assert project["tool"]["setuptools"]["package-data"] == {"my_kernels": ["tables/*.yaml"]}
    compile((tmp_path / "p" / "tests" / "test_conformance.py").read_text(), "test", "exec")


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_kind_asks_for_the_versions_that_the_library_itself_asks_for(kind: str) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    ours = {wanted for extra in extras.values() for wanted in extra}
    assert [wanted for wanted in KINDS[kind].dependencies if wanted not in ours] == []


def test_in_tree_it_is_a_folder_of_backends_that_is_found_by_looking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "backends").mkdir()
    (tmp_path / "pyproject.toml").write_text("")
    monkeypatch.setattr(tb, "__file__", str(tmp_path / "titans_backends" / "__init__.py"))
    result = new("newcomer", "--in-tree", "--json")
    assert result.exit_code == exit_codes.FINE, result.output
    assert sorted(json.loads(result.stdout)["files"]) == ["__init__.py", "fused_uw.py"]
    built_in = importlib.import_module("titans_backends.backends")
    monkeypatch.setattr(built_in, "__path__", [*built_in.__path__, str(tmp_path / "backends")])
    tb.reset()
    try:
        assert registry.known()["newcomer"].origin == "built in"
        assert statuses("newcomer", dtypes=(torch.float32,), regimes=("inference",))["refused"] == 0
    finally:
        for name in [name for name in sys.modules if name.startswith("titans_backends.backends.newcomer")]:
            del sys.modules[name]
        monkeypatch.undo()
        tb.reset()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["My-Kernel"], "'My-Kernel' cannot be a backend's name: it holds '-', and a name has only letters of ASCII, digits and _"),
        (["My-Kernel"], "What could be: titans-backends new-backend my_kernel"),
        (["Mine"], "it is not in lower case, as every backend's name is. What could be: titans-backends new-backend mine"),
        (["class"], "it is a keyword of Python, and cannot be imported. What could be: titans-backends new-backend my_class"),
        (["1x"], "it begins with a digit, and no name in Python does. What could be: titans-backends new-backend my_1x"),
        (["größe"], "it holds 'ß', 'ö', and a name has only letters of ASCII"),
        ([""], "it is empty. What could be: titans-backends new-backend my_backend"),
        (["_hidden"], "it begins with _, as what is private does. What could be: titans-backends new-backend hidden"),
        (["eager"], "there is such a backend already (built in); known: cupy, eager, fla"),
        (["eager"], "What could be: titans-backends new-backend my_eager"),
        (["json"], "there is such a module already"),
        (["torch"], "there is such a module already"),
        (["reference"], "what the contracts' references are called"),
        (["mine", "--op", "softmax"], "unknown op 'softmax'; known: chunk_flux"),
        (["mine", "--kind", "rust"], "unknown kind 'rust'; known: cupy, numba, torch, triton"),
        (["mine", "--kind", "triton", "--op", "slow_core"], "begin slow_core with --kind torch"),
        (["mine", "--in-tree", "--output", "x"], "give one of the two"),
    ],
)
def test_what_cannot_be_is_refused_with_what_could(words: list[str], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = new(*words)
    assert result.exit_code == exit_codes.MISUSED
    assert reason in result.stderr.replace("\n", " ")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_over(tmp_path: Path) -> None:
    assert new("mine", "--output", tmp_path / "p").exit_code == exit_codes.FINE
    before = (tmp_path / "p" / "mine" / "fused_uw.py").read_text()
    again = new("other", "--output", tmp_path / "p")
    assert again.exit_code == exit_codes.MISUSED
    assert "nothing is written over" in again.stderr
    assert [path.name for path in (tmp_path / "p").iterdir() if path.is_dir()] in (["mine", "tests"], ["tests", "mine"])
    assert (tmp_path / "p" / "mine" / "fused_uw.py").read_text() == before
    (tmp_path / "file").write_text("")
    assert new("other", "--output", tmp_path / "file").exit_code == exit_codes.MISUSED
    nowhere = new("other", "--output", tmp_path / "file" / "p")
    assert nowhere.exit_code == exit_codes.MISUSED
    assert "cannot be written: Not a directory" in nowhere.stderr.replace("\n", " ")


def test_in_tree_wants_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tb, "__file__", str(tmp_path / "titans_backends" / "__init__.py"))
    result = new("mine", "--in-tree")
    assert result.exit_code == exit_codes.MISUSED
    assert "--in-tree wants a checkout" in result.stderr


def test_it_prints_what_to_type_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = new("my_kernels", "--kind", "triton").stdout
    for line in (
        "cd titans-backends-my-kernels",
        "pip install -e '.[test]'",
        "titans-backends verify --backend my_kernels",
        "tune --op fused_uw",
        "TRITON_INTERPRET=1",
    ):
        assert line in said
