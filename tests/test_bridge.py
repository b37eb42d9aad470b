"""The bridge maps two names, only where the folders stand beside the package, and there is one of it however often it is installed."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from titans_backends import _bridge


def package_with(root: Path, *folders: str) -> Path:
    """A package folder with packages at the given places below `root`."""
    for folder in ("titans_backends", *folders):
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / folder / "__init__.py").touch()
    return root / "titans_backends"


def bridges() -> list[object]:
    return [finder for finder in sys.meta_path if type(finder).__name__ == "Bridge"]


def test_folders_beside_the_package_are_mapped_and_no_others(tmp_path: Path) -> None:
    package = package_with(tmp_path, "backends", "autotune_cache", "tests")
    assert _bridge.beside(package) == {
        "titans_backends.backends": tmp_path / "backends",
        "titans_backends.autotune_cache": tmp_path / "autotune_cache",
    }


def test_folders_inside_the_package_win_over_folders_beside_it(tmp_path: Path) -> None:
    package = package_with(tmp_path, "backends", "autotune_cache", "titans_backends/backends", "titans_backends/autotune_cache")
    assert _bridge.beside(package) == {}


def test_a_folder_without_an_init_is_not_mapped(tmp_path: Path) -> None:
    package = package_with(tmp_path, "autotune_cache")
    (tmp_path / "backends").mkdir()
    assert list(_bridge.beside(package)) == ["titans_backends.autotune_cache"]


def test_only_the_two_names_are_found(tmp_path: Path) -> None:
    bridge = _bridge.Bridge(_bridge.beside(package_with(tmp_path, "backends", "backends/triton", "autotune_cache")))
    spec = bridge.find_spec("titans_backends.backends")
    assert spec is not None
    assert spec.submodule_search_locations == [str(tmp_path / "backends")]
    strangers = ("backends", "triton", "titans_backends", "titans_backends.tests", "titans_backends.backends.triton", "autotune_cache")
    assert [name for name in strangers if bridge.find_spec(name) is not None] == []


def test_installing_again_replaces_the_earlier_bridge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    _bridge.install()
    once = len(bridges())
    importlib.reload(_bridge).install()
    assert len(bridges()) == once
