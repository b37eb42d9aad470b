"""Where the cache files are: the user's, one per device, and the tables that ship with the library. Never creates one."""

from __future__ import annotations

import importlib.resources
from pathlib import Path

import platformdirs

__all__ = ["SHIPPED_PACKAGE", "TIMINGS_SUFFIX", "shipped_paths", "tables_in", "timings_path", "user_cache_path"]

SHIPPED_PACKAGE = "titans_backends.autotune_cache"
TIMINGS_SUFFIX = ".timings.yaml"


def user_cache_path(slug: str) -> Path:
    """The user's table for a device, in platformdirs' cache folder (on Linux under XDG_CACHE_HOME)."""
    return Path(platformdirs.user_cache_dir("titans_backends")) / f"{slug}.yaml"


def timings_path(path: Path | str) -> Path:
    """The timings beside a table: `x.timings.yaml` for `x.yaml`, and for `x` too."""
    path = Path(path)
    stem = path.name.removesuffix(".yaml").removesuffix(".yml")
    return (path.parent if path.name else path) / (stem + TIMINGS_SUFFIX)  # "." and "/" have no name


def shipped_paths() -> tuple[Path, ...]:
    """Every shipped table, sorted; none where the folder is missing."""
    try:
        folder = importlib.resources.files(SHIPPED_PACKAGE)
    except ModuleNotFoundError:
        return ()
    return tables_in(folder) if isinstance(folder, Path) else ()


def tables_in(folder: Path) -> tuple[Path, ...]:
    """Every table of a folder, sorted, without the timings beside them."""
    return tuple(sorted(item for item in folder.iterdir() if item.name.endswith(".yaml") and not item.name.endswith(TIMINGS_SUFFIX)))
