"""Imports point downwards, as docs/architecture.md says: read from the sources, so that nothing need be installed or run."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIBRARY, BACKENDS = ROOT / "titans_backends", ROOT / "backends"

CORE = "core"
"""The files that stand in `titans_backends/` itself."""
MAY_IMPORT: dict[str, set[str]] = {
    "contracts": set(),
    "cache": {CORE},
    "launching": {"contracts", CORE},
    CORE: {"contracts", "cache"},
    "tuning": {"contracts", "cache", CORE},
    "conformance": {"contracts", "tuning", CORE},
    "nn": {"contracts", CORE},
    "integrations": {"contracts", "nn", CORE},
    "scaffold": {"tuning", CORE},
    "reporting": {"contracts", "cache", "tuning", CORE},
    "cli": {"contracts", "cache", "tuning", "conformance", "scaffold", "reporting", CORE},
}
"""What a package may import beside itself when it is imported; `titans_backends.errors` everybody may. A function may import more, for its own call."""
ENTRIES = {"__init__.py", "__main__.py"}
"""Of the core: where the layers above meet."""
A_BACKEND_KNOWS = {
    "backend", "contracts", "errors", "facts", "launching", "machine", "precision", "signature", "verdict",
    "plans", "tables",  # the adapters alone: a peer that is loaded late changes the choice
}  # fmt: skip
ADAPTERS = {"peers.py", "serving.py"}


def imported(node: ast.AST, *, inside: bool) -> Iterator[tuple[str, str]]:
    """The modules of the library that a syntax tree imports, as (package, module), `inside` of functions too."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.stmt, ast.ExceptHandler)) or (isinstance(child, ast.FunctionDef) and not inside):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.ImportFrom) and child.module and child.module.partition(".")[0] == "titans_backends" and not child.level:
            names = [child.module] if "." in child.module else [f"titans_backends.{alias.name}" for alias in child.names]
            for name in names:
                first = name.split(".")[1]
                yield (first if (LIBRARY / first).is_dir() else CORE), first
        yield from imported(child, inside=inside)


def sources() -> Iterator[tuple[str, Path]]:
    """Every file of the library with the package that it belongs to."""
    for path in sorted(LIBRARY.rglob("*.py")):
        parts = path.relative_to(LIBRARY).parts
        if "templates" not in parts and (len(parts) > 1 or path.name not in ENTRIES):
            yield (parts[0] if len(parts) > 1 else CORE), path


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("package", sorted({package for package, _ in sources()}))
def test_a_package_imports_nothing_from_above(package: str) -> None:
    allowed = {package, *MAY_IMPORT[package]}
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for found, path in sources()
        if found == package
        for where, name in imported(tree(path), inside=False)
        if where not in allowed and name != "errors"
    ]
    assert wrong == []


def test_a_backend_knows_neither_the_tuner_nor_who_chose_it() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sorted(BACKENDS.rglob("*.py"))
        for where, name in imported(tree(path), inside=True)
        if name not in A_BACKEND_KNOWS or (name in ("plans", "tables") and path.name not in ADAPTERS)
    ]
    assert wrong == []


def test_the_core_names_no_backend() -> None:
    """It reaches them by the registry: by name through importlib."""
    names = {path.name for path in BACKENDS.iterdir() if (path / "__init__.py").is_file()}
    wrong = [
        f"{path.relative_to(ROOT)}: {node.module}"
        for _, path in sources()
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ImportFrom)
        and node.module
        and (node.module.startswith("titans_backends.backends") or node.module.split(".")[0] in names - {"numba"})
        if path.relative_to(LIBRARY).parts[0] != "integrations"
    ]
    assert wrong == []


def test_what_another_module_imports_stands_in_all() -> None:
    """But for a contract's `reference` and `work`, which go by their module's name."""
    public: dict[str, set[str]] = {}
    trees = {path: tree(path) for _, path in sources()}
    for path, found in trees.items():
        for node in found.body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                assert isinstance(node.value, (ast.List, ast.Tuple))
                public[".".join(path.relative_to(ROOT).with_suffix("").parts)] = {element.value for element in node.value.elts}  # type: ignore[attr-defined]
    wrong = [
        f"{path.relative_to(ROOT)} imports {alias.name} of {node.module}"
        for path, found in trees.items()
        for node in ast.walk(found)
        if isinstance(node, ast.ImportFrom) and node.module in public
        for alias in node.names
        if alias.name not in public[node.module] | {"reference", "work"}
    ]
    assert wrong == []
