"""Which modules of a backend stand behind a candidate: those that it names, and what they import from backends, directly or not.

So a change in a shared piece, a triangular inverse say, makes every row that runs it stale. Files are parsed, never imported; what a
candidate imports from the core or from other packages does not count.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path

__all__ = ["with_imports"]

_BUILT_IN = "titans_backends.backends"


def with_imports(names: Sequence[str], without: Sequence[str] = ()) -> tuple[str, ...]:
    """The names and the modules that they reach, sorted, but not through those `without` and what lies below them; what is no module of a package on disk
    (a .cu file, say) stays. ValueError for one `without` that its package does not have."""
    for name in without:
        if _folder(_home(name)) is not None and _locate(name) is None:
            raise ValueError(f"{name!r} is no module of {_home(name)}")
    below = tuple(f"{name}." for name in without)
    found, todo = set(names), list(names)
    while todo:
        name = todo.pop()
        path = _locate(name)
        if path is not None:
            status = path.stat()
            fresh = set(_imports(name, path, status.st_mtime_ns, status.st_size)) - found - set(without)
            fresh = {one for one in fresh if not one.startswith(below)}
            found |= fresh
            todo += fresh
    return tuple(sorted(found))


def _home(name: str) -> str:
    """The package within which imports count: the built-in backends, or a plugin's own."""
    return _BUILT_IN if name.startswith(_BUILT_IN + ".") else name.partition(".")[0]


@functools.lru_cache(maxsize=64)
def _folder(package: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(package)
    except ValueError:  # a module without a spec, made by hand
        return None
    places = None if spec is None else spec.submodule_search_locations
    return Path(next(iter(places))) if places else None


def _locate(name: str) -> Path | None:
    """The file of a module below its home package, found by its path alone."""
    home = _home(name)
    folder = _folder(home) if name.startswith(home + ".") else None
    if folder is None:
        return None
    stem = folder.joinpath(*name[len(home) + 1 :].split("."))
    return next((path for path in (stem.with_name(stem.name + ".py"), stem / "__init__.py") if path.is_file()), None)


@functools.lru_cache(maxsize=512)
def _imports(name: str, path: Path, _mtime_ns: int, _size: int) -> tuple[str, ...]:
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    tree = ast.parse(path.read_bytes(), str(path))
    home = _home(name) + "."
    return tuple(sorted({n for n in _named(tree, package) if n.startswith(home) and n != name and _locate(n) is not None}))


def _named(tree: ast.AST, package: str) -> Iterator[str]:
    """Every name that an import statement could mean: a module, or something in one. A module's own package of which it takes only modules does not count:
    a manifest that lists one op more changes no kernel."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1])
                base = f"{parent}.{base}" if base else parent
            taken = [f"{base}.{alias.name}" for alias in node.names]
            if base != package or any(_locate(one) is None for one in taken):
                yield base
            yield from taken
