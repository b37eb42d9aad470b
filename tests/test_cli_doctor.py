"""`doctor`: every state has its reason, every finding its command, and the status is the worst finding's."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import titans_backends
from titans_backends import registry
from titans_backends.buckets import defaults_of
from titans_backends.cache import file
from titans_backends.cache.paths import user_cache_path
from titans_backends.cache.schema import device_of
from titans_backends.cli import app
from titans_backends.cli.backend_check import BackendReport, check_backends
from titans_backends.cli.cache_check import CacheReport
from titans_backends.machine import detect
from titans_backends.tables import current_environment

run = CliRunner().invoke
MODULE = importlib.import_module("titans_backends.cli.doctor")
USABLE = BackendReport("eager", "built in", "plain torch", "usable", "", ("slow_core",), ("slow_core",))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tests share their cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A backend that raises on import."""
    (tmp_path / "crooked_backend.py").write_text("raise OSError('libcrooked.so [gone]')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("TITANS_BACKENDS_PLUGINS", "crooked_backend")
    titans_backends.reset()
    yield
    monkeypatch.undo()
    titans_backends.reset()


def test_usable_means_that_every_op_ran_and_was_right(eager_first: None) -> None:  # no other backend is tried before it
    eager = next(one for one in check_backends("cpu", run=True) if one.name == "eager")
    assert (eager.state, eager.reason) == ("usable", "")
    assert eager.right == eager.ops == tuple(titans_backends.ops())


def test_no_package_is_asked_for_that_would_not_run_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_installed", lambda package: False)
    found = {one.name: one for one in check_backends("cpu", run=False)}
    assert "not installed: pip install 'fla-core" in found["fla"].reason
    assert found["fla"].install == ""
    assert found["numba_cpu"].install


def test_without_running_nothing_is_more_than_importable() -> None:
    assert {one.state for one in check_backends("cpu", run=False)} <= {"importable", "refused", "broken"}


def test_a_broken_backend_is_status_1_with_its_traceback_on_demand(plugin: None) -> None:
    result = run(app, ["doctor", "--no-run", "--device", "cpu"])
    assert result.exit_code == 1, result.output
    assert "libcrooked.so [gone]" in result.stdout
    assert "titans-backends doctor --traceback crooked_backend" in result.stdout
    assert "TITANS_BACKENDS_PLUGINS" in result.stdout
    trace = run(app, ["doctor", "--traceback", "crooked_backend"])
    assert trace.exit_code == 1
    assert "Traceback (most recent call last)" in trace.stdout
    assert "OSError: libcrooked.so [gone]" in trace.stdout
    assert "has no traceback" in run(app, ["doctor", "--traceback", "eager"]).stdout


def cache(**changes: object) -> CacheReport:
    facts: dict[str, object] = {"kind": "user cache", "path": Path("/c/x.yaml"), "exists": True, "rows": 3, "problem": "", "writable": True}
    facts |= {"world_writable": False, "renewals": (), "damaged": ()}
    return CacheReport(**{**facts, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("backends", "caches", "level", "command"),
    [
        ([USABLE], [cache(exists=False)], "note", "titans-backends tune"),
        ([USABLE], [cache(problem="x.yaml:3: damaged")], "falls short", "titans-backends tune"),
        ([USABLE], [cache(world_writable=True)], "falls short", "chmod o-w /c/x.yaml /c"),
        ([USABLE], [cache(writable=False)], "note", "titans-backends tune --output OTHER.yaml"),
        ([USABLE], [cache(damaged=(Path("/c/x.yaml.damaged-1"),))], "note", "titans-backends cache reset --damaged"),
        (
            [USABLE, BackendReport("t", "", "", "refused", "triton is not installed", install="pip install triton")],
            [cache()],
            "note",
            "pip install triton",
        ),
        ([USABLE, BackendReport("t", "", "", "broken", "it died")], [cache()], "falls short", "titans-backends doctor --traceback t"),
        ([BackendReport("eager", "", "", "refused", "disabled")], [cache()], "broken", "pip install --force-reinstall titans-backends"),
    ],
)
def test_each_finding_has_its_level_and_command(backends: list[BackendReport], caches: list[CacheReport], level: str, command: str) -> None:
    (finding,) = MODULE.find(backends, caches)
    assert (finding.level, finding.command) == (level, command)


def test_nothing_to_find_is_nothing() -> None:
    assert MODULE.find([USABLE], [cache()]) == []
    assert (cache(rows=1).described, cache(rows=2).described) == ("1 row", "2 rows")


@pytest.mark.parametrize(("state", "status"), [("usable", 0), ("refused", 2)])
def test_the_status_is_the_worst_findings(monkeypatch: pytest.MonkeyPatch, state: str, status: int) -> None:
    monkeypatch.setattr(MODULE, "check_backends", lambda *_, **__: [BackendReport("eager", "built in", "", state, "why")])  # type: ignore[arg-type]
    result = run(app, ["doctor", "--device", "cpu", "--json"])
    assert result.exit_code == status
    said = json.loads(result.stdout)
    assert said["backends"][0]["state"] == state
    assert said["machine"]["slug"] == detect("cpu").slug
    assert said["versions"]["torch"] == torch.__version__


def test_a_damaged_cache_is_named_and_left_as_it_is() -> None:
    path = user_cache_path(detect("cpu").slug)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("schema: 1\nops: [\n")
    try:
        result = run(app, ["doctor", "--no-run", "--device", "cpu"], env={"COLUMNS": "80"})
        assert result.exit_code == 1
        assert path.read_text() == "schema: 1\nops: [\n"
        assert "".join(result.stdout.split()).count(path.name) == 2  # among the tables, and with what is to be done
    finally:
        path.unlink()


def test_a_cache_that_anybody_may_change_is_status_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "check_backends", lambda *_, **__: [USABLE])
    path = user_cache_path(detect("cpu").slug)
    file.update(path, device=device_of(detect("cpu")), environment=current_environment("cpu"), changes={}, defaults_of=defaults_of)
    path.chmod(0o666)
    try:
        result = run(app, ["doctor", "--device", "cpu"])
        assert result.exit_code == 1
        assert f"chmod o-w {path}" in result.stdout
        path.chmod(0o600)
        assert run(app, ["doctor", "--device", "cpu"]).exit_code == 0
    finally:
        path.unlink()
