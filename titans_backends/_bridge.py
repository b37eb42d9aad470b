"""Finds `titans_backends.backends` and `titans_backends.autotune_cache` in a checkout, where they stand beside the package.

`titans_backends/__init__.py` calls `_bridge.install()` before it imports anything else of ours. Two names only: no other file beside the
package becomes importable, and no folder goes on `sys.path` (`backends/triton` would shadow triton). Where the folders stand inside the
package, as a wheel has them, nothing is installed. In an editable install setuptools maps the same names; ours comes first, so that the
folders are always those of the package that was imported, whichever checkout is installed.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

__all__ = ["FOLDERS", "Bridge", "beside", "install"]

FOLDERS = ("backends", "autotune_cache")


def beside(package: Path) -> dict[str, Path]:
    """The folders that stand beside `package` and not inside it, by the name that they are imported under."""
    return {
        f"{package.name}.{folder}": package.parent / folder
        for folder in FOLDERS
        if not (package / folder / "__init__.py").is_file() and (package.parent / folder / "__init__.py").is_file()
    }


class Bridge:
    """A meta-path finder for the names in `folders`, and for no other."""

    def __init__(self, folders: Mapping[str, Path]) -> None:
        self.folders = dict(folders)

    def find_spec(self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The folder's package; what lies deeper is found by its `__path__`, as in any package."""
        folder = self.folders.get(fullname)
        if folder is None:
            return None
        return spec_from_file_location(fullname, folder / "__init__.py", submodule_search_locations=[str(folder)])


def install() -> None:
    """Puts the bridge first on `sys.meta_path` where it is needed; again, as a reload does, replaces the earlier one."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not _is_bridge(finder)]
    # Not resolved: a strict editable install is a tree of links, and the folders stand inside that tree.
    folders = beside(Path(__file__).absolute().parent)
    if folders:
        sys.meta_path.insert(0, Bridge(folders))


def _is_bridge(finder: object) -> bool:
    """By name: one left by an earlier import of this module is of another class."""
    return (type(finder).__module__, type(finder).__qualname__) == (__name__, Bridge.__qualname__)
