"""docs/writing-a-backend.md is true: its commands run one after another, on a CPU, in an environment of their own, and leave what the page says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from tests.test_packaging import environment, pip_install
from titans_backends.cli import app
from titans_backends.scaffold import KINDS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "writing-a-backend.md"
DRIVER = """
import contextlib, io, json, os, shlex, sys
import pytest
from typer.testing import CliRunner
import titans_backends as tb
from titans_backends.cli import app

said = {}
for kind, text in json.load(sys.stdin):
    if kind == "sh":
        program, *words = shlex.split(text)
        with contextlib.redirect_stdout(io.StringIO()) as shown:
            if program == "mkdir":
                status = os.mkdir(*words)
            elif program == "pytest":
                status = int(pytest.main([*words, "-p", "no:cacheprovider"]))
            else:
                assert program == "titans-backends", text
                result = CliRunner().invoke(app, words)
                status = result.exit_code
                print(result.output)
        said[text] = [status, shown.getvalue()]
    else:
        assert os.path.isfile(kind), f"the page changes {kind}, which new-backend did not write"
        with open(kind, "w") as file:
            file.write(text)
    for name in [name for name in sys.modules if name.partition(".")[0] == "mine"]:
        del sys.modules[name]
    tb.reset()
print(json.dumps(said))
"""
"""Types the commands in one process, since each would import torch first; a new process's view of the plugin is made by forgetting it."""


def steps() -> list[tuple[str, str]]:
    """What the page has the reader do, in order: `sh`, a command; or a path, and the text that the file then has."""
    found = []
    for language, body in re.findall(r"^```(sh|python)\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL):
        if language == "sh":
            found += [("sh", line) for line in body.splitlines()]
        else:
            first, _, text = body.partition("\n")
            found.append((first.removeprefix("# "), text))
    return found


def test_every_command_on_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (_, new), (_, enter), (_, install), *rest = steps()
    assert CliRunner().invoke(app, new.split()[1:]).exit_code == 0
    folder = tmp_path / enter.removeprefix("cd ")
    assert install == "pip install -e '.[test]'"
    python = environment(tmp_path / "venv")
    pip_install(python, "-e", ".", cwd=folder)
    env = {name: value for name, value in os.environ.items() if not name.startswith(("TITANS_BACKENDS_", "PYTEST_"))}
    env |= {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path / "cache"), "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "160"}
    done = subprocess.run([python, "-P", "-c", DRIVER], cwd=folder, env=env, input=json.dumps(rest), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert list(said) == list(dict.fromkeys(text for kind, text in rest if kind == "sh"))
    failed = {text: shown for text, (status, shown) in said.items() if status not in ((0, 1) if "doctor" in text else (0, None))}
    assert failed == {}

    doctor = said["titans-backends doctor --no-run"][1]
    assert re.search(r"mine +importable .*entry point of titans-backends-mine", doctor), doctor
    assert re.search(r"backend mine +1 row\b", doctor), doctor  # its table; the page asks twice, and this is the second time
    assert " passed" in said['pytest -q -k "plain and float32"'][1]
    assert "mine/two_products" in said["titans-backends explain fused_uw --seq-len 512 --heads 12 --head-dim 32"][1]
    table = yaml.safe_load((folder / "mine" / "tables" / "this_machine.yaml").read_text())
    assert list(table["ops"]) == ["fused_uw"]
    timings = (folder / "mine" / "tables" / "this_machine.timings.yaml").read_text()
    assert "mine/slices" in timings
    assert "matrices: 64" in timings


def test_the_page_shows_every_kind() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert [kind for kind in KINDS if f"| `{kind}` |" not in page] == []


def test_the_example_is_what_the_page_leads_to(tmp_path: Path) -> None:
    """Its files are those of new-backend but for the kernel, which is the page's; it runs in the conformance suite like any other."""
    example = ROOT / "examples" / "titans-backends-sliced"
    assert CliRunner().invoke(app, ["new-backend", "sliced", "--output", str(tmp_path / "new")]).exit_code == 0
    written = {path.relative_to(tmp_path / "new") for path in (tmp_path / "new").rglob("*") if path.is_file()}
    kernel = Path("sliced") / "fused_uw.py"
    assert [str(name) for name in written - {kernel} if (example / name).read_text() != (tmp_path / "new" / name).read_text()] == []
    page = next(text for kind, text in steps() if kind == "mine/fused_uw.py").replace('"mine"', '"sliced"')
    assert (example / kernel).read_text().partition('"""\n\n')[2] == page

    env = {name: value for name, value in os.environ.items() if not name.startswith(("TITANS_BACKENDS_", "PYTEST_"))}
    env |= {"PYTHONPATH": f"{ROOT}:{example}", "TITANS_BACKENDS_PLUGINS": "sliced", "XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "-q", "-k", "float32 and inference", "-p", "no:cacheprovider", "-n", "0", str(example)]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert re.search(r"^\d+ passed", done.stdout, flags=re.MULTILINE), done.stdout + done.stderr
