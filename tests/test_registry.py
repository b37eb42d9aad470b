"""Backends are found without importing kernels; a broken one is visible and harmless."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import titans_backends as tb
from tests import fresh
from tests.loopback import install
from titans_backends import CONTRACT_VERSION, Backend, Machine, registry


def plugin(patch: pytest.MonkeyPatch, name: str, backend: object) -> None:
    module = ModuleType(name)
    module.BACKEND = backend  # type: ignore[attr-defined]
    patch.setitem(sys.modules, name, module)
    patch.setenv("TITANS_BACKENDS_PLUGINS", name)
    tb.reset()


@pytest.fixture(autouse=True)
def forget() -> object:
    yield
    tb.reset()


def test_eager_is_there_and_second_to_numba_on_a_cpu() -> None:
    assert [backend.name for backend in registry.order("cpu")][:2] == ["numba_cpu", "eager"]
    assert registry.order("mps")[0].name == "eager"


def test_another_contract_version_is_visible_and_harmless(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        plugin(patch, "from_the_future", Backend("future", "", CONTRACT_VERSION + 1, {}, simplicity=1, rank={"cpu": -5}))
        assert "written for contract version 2" in registry.broken()["future"].reason
        assert "future" not in registry.known()
        x = torch.randn(1, 4, 1, 4)
        assert tb.get_op("fast_core")(x, x, x)[0].shape == x.shape
        with pytest.raises(tb.BackendError, match=r"backend 'future' is broken: .*titans-backends doctor"):
            tb.get_op("fast_core", backend="future")


def test_a_doubled_name_is_visible_and_the_first_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        plugin(patch, "impostor", Backend("eager", "", CONTRACT_VERSION, {}, simplicity=1, rank={"cpu": 0}))
        (broken,) = registry.broken().values()
        assert "the name 'eager' is taken by the one that is built in" in broken.reason
        assert registry.get("eager").origin == "built in"


def test_a_manifest_that_raises_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "explosive.py").write_text("raise RuntimeError('boom')\n")
    with monkeypatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        patch.setenv("TITANS_BACKENDS_PLUGINS", "explosive")
        tb.reset()
        broken = registry.broken()["explosive"]
        assert "RuntimeError: boom" in broken.reason
        assert "explosive.py" in broken.trace
        with pytest.raises(tb.UnknownNameError, match=r"unknown backend 'explosive_kernels'; known: .*eager.*; broken, .*doctor says: explosive"):
            registry.get("explosive_kernels")


def test_a_plugin_that_is_not_importable_says_how_it_would_be(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("TITANS_BACKENDS_PLUGINS", "no_such_plugin")
        tb.reset()
        assert registry.broken()["no_such_plugin"].reason.endswith("(PYTHONPATH=. finds what lies in the current folder)")


def test_a_module_without_a_backend_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        plugin(patch, "empty_plugin", None)
        assert "has no BACKEND of type titans_backends.Backend, but NoneType" in registry.broken()["empty_plugin"].reason


@pytest.mark.usefixtures("eager_first")
def test_an_op_module_that_does_not_import_refuses_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        plugin(patch, "hollow", Backend("hollow", "", CONTRACT_VERSION, {"fast_core": "no_such_module_xyz"}, simplicity=1, rank={"cpu": -1}))
        x = torch.randn(1, 4, 1, 4)
        told = tb.get_op("fast_core").explain(x, x, x)
        assert told.kernel.startswith("eager/")
        assert "importing no_such_module_xyz raised ModuleNotFoundError" in str(told)
        assert registry.probe(registry.get("hollow"), tb.detect("cpu")).state == "broken"


def test_a_missing_package_refuses_with_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Backend(
        "needy", "", CONTRACT_VERSION, {"fast_core": "x"}, simplicity=1, rank={"cpu": 1}, requires=("no_such_pkg",), install="pip install no-such-pkg"
    )
    with monkeypatch.context() as patch:
        plugin(patch, "needy_plugin", backend)
        verdict = registry.availability(registry.get("needy"), tb.detect("cpu"))
        assert str(verdict) == "the package no_such_pkg is not installed: pip install no-such-pkg"


def test_a_disabled_backend_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("TITANS_BACKENDS_DISABLE", "eager")
        tb.reset()
        x = torch.randn(1, 4, 1, 4)
        with pytest.raises(tb.BackendRefusedError, match="disabled by TITANS_BACKENDS_DISABLE"):
            tb.get_op("fast_core")(x, x, x, backend="eager")


def test_a_backend_for_another_kind_of_device_says_so() -> None:
    backend = Backend("gpu_only", "", CONTRACT_VERSION, {}, simplicity=1, rank={"cuda": 0})
    assert "it does not run on cpu (it runs on cuda)" in str(registry.availability(backend, Machine("cpu", "x", "x")))


def test_an_installed_plugin_is_found_by_its_entry_point(tmp_path: Path) -> None:
    """A real distribution: metadata on disk, found in a fresh process, run, and its broken neighbour reported."""
    (tmp_path / "dummy_backend").mkdir()
    (tmp_path / "dummy_backend" / "__init__.py").write_text(
        "from titans_backends import CONTRACT_VERSION, Backend\n"
        "BACKEND = Backend('dummy', 'a plugin', CONTRACT_VERSION, {'fused_uw': 'dummy_backend.fused_uw'}, simplicity=5, rank={'cpu': -1})\n"
    )
    (tmp_path / "dummy_backend" / "fused_uw.py").write_text(
        "import torch\nfrom titans_backends import ACCEPTED, Candidate\n"
        "def supports(signature, machine): return ACCEPTED\n"
        "def candidates(signature, machine): return [Candidate('dummy', 'matmul')]\n"
        "def run(call, candidate): return call.attn_const @ call.v_beta, call.attn_const @ call.k_beta\n"
    )
    info = tmp_path / "dummy_backend-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: dummy-backend\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[titans_backends.backends]\ndummy = dummy_backend\nsick = no_such_module_at_all\n")
    code = (
        "import torch, titans_backends as tb\nfrom titans_backends import registry\n"
        "x = torch.eye(4); op = tb.get_op('fused_uw'); op(x, x, x)\n"
        "print(op.explain(x, x, x).kernel, registry.get('dummy').origin, '|', registry.broken()['sick'].reason)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}
    done = fresh.run(code, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("dummy/matmul entry point of dummy-backend | importing no_such_module_at_all raised ModuleNotFoundError")


def test_a_package_without_a_spec_is_there_and_none_that_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    needy = Backend(
        "needy", "needs a package", CONTRACT_VERSION, {}, simplicity=5, rank={"*": 9}, requires=("put_here_by_hand",), install="type this"
    )
    machine = tb.detect("cpu")
    assert str(registry.availability(needy, machine)) == "the package put_here_by_hand is not installed: type this"
    monkeypatch.setitem(sys.modules, "put_here_by_hand", ModuleType("put_here_by_hand"))  # find_spec raises for such a one
    assert registry.availability(needy, machine)


@pytest.mark.usefixtures("eager_first")
def test_a_backend_that_raises_when_asked_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    def supports(signature: object, machine: object) -> object:
        raise ZeroDivisionError("oh")

    with monkeypatch.context() as patch:
        install(patch, "clumsy", supports=supports)
        x = torch.randn(1, 4, 1, 4)
        told = tb.get_op("fast_core").explain(x, x, x)
        assert "asking it raised ZeroDivisionError: oh" in str(told)
        assert told.kernel.startswith("eager/")


def test_importing_the_library_imports_no_kernel_package() -> None:
    code = (
        "import sys, titans_backends as tb\ntb.get_op('slow_core'); tb.get_op('slow_core', backend='eager')\n"
        "bad = [n for n in sys.modules if n.split('.')[0] in ('triton', 'cupy', 'numba') or n.startswith('titans_backends.backends.eager.')]\n"
        "bad += [n for n in sys.modules if n.startswith('titans_backends.nn')]\n"
        "bad += [n for n in ('typer', 'rich', 'yaml._yaml') if n in sys.modules and n != 'yaml._yaml']\nprint(bad)\n"
    )
    done = fresh.run(code)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
