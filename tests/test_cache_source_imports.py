"""A row holds as long as everything that its candidate runs: the modules behind it are found through their imports, without importing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from titans_backends.backend import Candidate
from titans_backends.cache.source_hash import source_hash
from titans_backends.cache.source_imports import with_imports
from titans_backends.offers import source_modules

HERE = "titans_backends.backends.eager"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A plugin whose op imports in every way; importing any of it would fail."""
    files = {
        "op.py": "from . import near\nfrom .inner import deep\nimport pluginpkg.plain\nfrom pluginpkg.named import something\nimport math\nraise SystemExit",
        "near.py": "from .op import run  # a circle\n",
        "inner/__init__.py": "from ..above import x\n",
        "inner/deep.py": "",
        "inner/beside.py": "from . import deep\n",
        "inner/taken.py": "from . import x\n",
        "above.py": "x = 1",
        "plain.py": "",
        "named.py": "something = 1\n",
        "unrelated.py": "",
        "__init__.py": "",
    }
    for name, text in files.items():
        path = tmp_path / "pluginpkg" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path / "pluginpkg"
    for name in [name for name in sys.modules if name.partition(".")[0] == "pluginpkg"]:
        del sys.modules[name]


def test_every_kind_of_import_is_followed_once(package: Path) -> None:
    assert with_imports(["pluginpkg.op"]) == tuple(f"pluginpkg.{name}" for name in ("above", "inner", "inner.deep", "named", "near", "op", "plain"))
    assert "pluginpkg.op" not in sys.modules


def test_what_is_left_out_is_not_followed_either(package: Path) -> None:
    kept = with_imports(["pluginpkg.op"], without=["pluginpkg.inner"])  # and with it what lies below
    assert kept == tuple(f"pluginpkg.{name}" for name in ("named", "near", "op", "plain"))


def test_what_is_to_be_left_out_must_be_there(package: Path) -> None:
    with pytest.raises(ValueError, match=r"'pluginpkg\.innner' is no module of pluginpkg"):
        with_imports(["pluginpkg.op"], without=["pluginpkg.innner"])


def test_a_name_that_is_no_module_stays() -> None:
    assert with_imports(["kernels.cu", "no_such_module_here"]) == ("kernels.cu", "no_such_module_here")


def test_a_change_in_a_shared_piece_changes_the_hash_of_what_imports_it(package: Path) -> None:
    before = source_hash(with_imports(["pluginpkg.op"]))
    (package / "inner" / "deep.py").write_text("changed = True\n")
    assert source_hash(with_imports(["pluginpkg.op"])) != before


@pytest.mark.usefixtures("package")
def test_a_modules_own_package_counts_where_something_in_it_is_taken_and_not_where_a_module_is() -> None:
    assert with_imports(["pluginpkg.inner.beside"]) == ("pluginpkg.inner.beside", "pluginpkg.inner.deep")
    assert "pluginpkg.inner" in with_imports(["pluginpkg.inner.taken"])


def test_the_eager_rule_stands_on_its_inverse_and_its_scan_and_not_on_another_op() -> None:
    found = source_modules(Candidate("eager", "chunked"), "gated_delta_rule")
    assert {f"{HERE}.{name}" for name in ("gated_delta_rule", "delta_scan", "triangular", "chunk_grid", "decay")} <= set(found)
    assert f"{HERE}.gated_delta_step" not in found
    assert f"{HERE}.triangular" not in source_modules(Candidate("eager", "two_products"), "fused_uw")
