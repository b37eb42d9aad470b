"""Where cache files are, and the versions that go into them."""

from __future__ import annotations

import datetime
import sys
from pathlib import Path

import torch

import titans_backends
from titans_backends.cache import paths
from titans_backends.cache.environment import current_environment, torch_version


def test_user_cache_honours_xdg_cache_home(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if sys.platform == "linux":
        assert paths.user_cache_path("slug") == tmp_path / "titans_backends" / "slug.yaml"
    assert not (tmp_path / "titans_backends").exists()


def test_timings_stand_beside_their_table():
    assert paths.timings_path("a/nvidia.v2.yaml") == Path("a/nvidia.v2.timings.yaml")
    assert paths.timings_path("x") == Path("x.timings.yaml")


def test_shipped_tables_are_found_without_their_timings(monkeypatch, tmp_path):
    package = tmp_path / "shipped_tables_of_test"
    package.mkdir()
    for name in ("__init__.py", "b.yaml", "a.yaml", "a.timings.yaml"):
        (package / name).write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(paths, "SHIPPED_PACKAGE", package.name)
    assert [path.name for path in paths.shipped_paths()] == ["a.yaml", "b.yaml"]
    assert paths.tables_in(package) == (package / "a.yaml", package / "b.yaml")
    monkeypatch.setattr(paths, "SHIPPED_PACKAGE", "no_such_package_here")
    assert paths.shipped_paths() == ()


def test_environment_holds_this_process_versions():
    found = current_environment("cpu", datetime.date(2026, 12, 1))
    assert torch.__version__.startswith(found.torch)
    assert (found.triton, found.cuda, found.driver, found.date) == (None, None, None, "2026-12-01")
    assert found.titans_backends == titans_backends.__version__
    assert (found.cupy, found.numba_cuda) == (None, None)
    assert current_environment("cuda").cuda == torch.version.cuda


def test_torch_version_drops_the_wheel_flavour_only():
    assert [torch_version(v) for v in ("2.13.0+cpu", "2.13.0+cu130", "2.13.0a0+git12", "2.12.1")] == ["2.13.0", "2.13.0", "2.13.0a0+git12", "2.12.1"]
